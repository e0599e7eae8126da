"""The package is installed from what git has, with a compiler and with one that fails; the installed one is asked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_serve.doctor.machine import ASK_TORCH

ROOT = Path(__file__).parents[1]
WORDS = "broken-compiler: fatal error: out of ink"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout without what was built in it."""
    copy = tmp_path_factory.mktemp("sources") / "moe-serve"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if name.startswith(("moe_serve/", "kernels/")) or "/" not in name:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def install(sources: Path, target: Path, compiler: str | None) -> dict[str, object]:
    """What `moe-serve doctor` would be told by the installed package."""
    names = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), compiler) if compiler else {}
    environment = os.environ | {name: each for name, each in names.items() if each is not None}
    build = target.with_name("build tree")
    shutil.copytree(sources, build)
    command = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target), "."]
    subprocess.run([sys.executable, "-m", "pip", *command], cwd=build, env=environment, check=True, timeout=200)
    told = subprocess.run(
        [sys.executable, "-P", "-c", ASK_TORCH],
        cwd=target,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    facts: dict[str, object] = json.loads(told.stdout.splitlines()[-1])
    return facts


@pytest.mark.long
def test_with_a_compiler_there_are_kernels(sources: Path, tmp_path: Path) -> None:
    facts = install(sources, tmp_path / "installed", None)
    assert isinstance(facts["kernels"], list)
    assert facts["kernels"][-1] == "generic"
    assert facts["no_kernels"] == ""


@pytest.mark.long
@pytest.mark.parametrize("how", ["fails", "is not there"])
def test_without_a_compiler_the_package_is_whole_but_for_them_and_says_why(
    sources: Path, tmp_path: Path, how: str
) -> None:
    compiler = tmp_path / "broken-compiler"
    if how == "fails":
        compiler.write_text(f"#!/bin/sh\necho 'a line before' >&2\necho '{WORDS}' >&2\nexit 4\n")
        compiler.chmod(0o755)
    facts = install(sources, tmp_path / "installed", str(compiler))
    assert facts["kernels"] == []
    assert facts["no_kernels"] == (WORDS if how == "fails" else f"{compiler}: No such file or directory")
    assert (tmp_path / "installed/moe_serve/assets").is_dir()
