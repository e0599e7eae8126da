"""The training text: documents by domain, taken from Debian packages and from this Python's own library.

prose    the King James Bible, a document per chapter       (Debian: sword-text-kjv; public domain outside the UK)
spanish  the Reina-Valera of 1909, a document per chapter   (Debian: sword-text-sparv; public domain)
docs     Python's manuals in reStructuredText, by file      (Debian: python3.11-doc; PSF licence)
python   this interpreter's standard library, by file       (no package; PSF licence)
"""

from __future__ import annotations

import re
import struct
import subprocess
import sysconfig
import zlib
from collections.abc import Iterator
from html import unescape
from pathlib import Path

DOMAINS = ("prose", "spanish", "docs", "python")
PACKAGES = ("sword-text-kjv", "sword-text-sparv", "python3.11-doc")
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
_SKIPPED_FILES = re.compile(r"encodings/(?!__init__|aliases|idna|punycode|utf_8)|_sysconfigdata|html/entities\.py")
_CHAPTER = re.compile(r'<chapter [^>]*osisID="([^"]+)"[^>]*>')
_TITLE = re.compile(r'<milestone n="([^"]+)" type="x-usfm-h"')
_LEFT_OUT = re.compile(r"<note\b.*?</note>|<title\b.*?</title>|<milestone[^>]*>", re.DOTALL)


def documents(cache: Path) -> dict[str, dict[str, str]]:
    """For each domain its documents by name. Packages are fetched into `cache` with apt-get (no root needed)."""
    roots = {package: unpacked(package, cache) for package in PACKAGES}
    modules = {
        name: next(root.glob("usr/share/sword/modules/texts/ztext/*"))
        for name, root in roots.items()
        if name.startswith("sword")
    }
    return {
        "prose": dict(chapters(modules["sword-text-kjv"])),
        "spanish": dict(chapters(modules["sword-text-sparv"])),
        "docs": dict(files(next(roots["python3.11-doc"].rglob("_sources")), "*.rst.txt")),
        "python": dict(files(Path(sysconfig.get_paths()["stdlib"]), "*.py")),
    }


def unpacked(package: str, cache: Path) -> Path:
    """The folder with a Debian package's files, downloaded and unpacked on first use. SystemExit if it cannot be."""
    root = cache / package
    if root.is_dir():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob(f"{package}_*.deb")):
        done = _call(["apt-get", "download", package], cache)
        if done:
            raise SystemExit(
                f"the Debian package {package} could not be downloaded: {done}\n"
                f"Run `apt-get update` first, or put {package}_*.deb (from packages.debian.org) into {cache}."
            )
    deb = next(cache.glob(f"{package}_*.deb"))
    if problem := _call(["dpkg-deb", "-x", str(deb), f"{root}.part"], cache):
        raise SystemExit(f"{deb} could not be unpacked: {problem}")
    Path(f"{root}.part").rename(root)
    return root


def _call(command: list[str], folder: Path) -> str:
    """What went wrong, or nothing."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip() or f"exit status {done.returncode}" if done.returncode else ""


def files(root: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """Text files below `root` by relative path; tests, tables and tiny files left out."""
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root).as_posix()
        if _SKIPPED_FOLDERS.isdisjoint(Path(name).parts) and not _SKIPPED_FILES.search(name):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if len(text) >= 400:
                yield name, text


def chapters(module: Path) -> Iterator[tuple[str, str]]:
    """Chapters of a SWORD zText module with OSIS markup: ("Gen.1", "Genesis 1\\n\\nIn the beginning ...\\n...")."""
    book, name, verses = "", "", list[str]()
    for entry in (entry for testament in ("ot", "nt") for entry in _entries(module / testament)):
        if found := _TITLE.search(entry):
            book = unescape(found[1])
        if found := _CHAPTER.search(entry):
            if len(verses) > 1:
                yield name, "\n".join(verses) + "\n"
            name = found[1]
            verses = [f"{book} {name.split('.')[-1]}\n"]
            entry = entry[found.end() :]
        text = unescape(re.sub(r"<[^>]*>", "", _LEFT_OUT.sub("", entry))).replace("¶", "")
        if verses and (text := " ".join(text.split())):
            verses.append(text)
    if len(verses) > 1:
        yield name, "\n".join(verses) + "\n"


def _entries(stem: Path) -> Iterator[str]:
    """Verses and headings in order. bzs lists the packed blocks (offset, size, -), bzv the entries (block, offset,
    size)."""
    packed = stem.with_suffix(".bzz").read_bytes()
    places = struct.iter_unpack("<III", stem.with_suffix(".bzs").read_bytes())
    blocks = [zlib.decompress(packed[start : start + size]) for start, size, _ in places]
    for block, start, size in struct.iter_unpack("<IIH", stem.with_suffix(".bzv").read_bytes()):
        if size:
            yield blocks[block][start : start + size].decode("utf-8")
