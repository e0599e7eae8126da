"""Docs are up to date where they are generated, and name only files, code and options that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from moe_serve.base.config import SECTIONS
from moe_serve.cli import chat_command, doctor, eplb, make_model, plan
from moe_serve.cli.flags import Options, spellings
from moe_serve.cli.k8s import render_options
from moe_serve.cli.main import COMMANDS
from moe_serve.cli.serve import serve_options
from scripts.generate_docs import generated, kind_of, replaced
from tests.architecture.test_floors import FLOORS

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"^(?:\.{0,2}/)?[\w.-]+(?:/[\w.-]+)+/?$|^[\w-]+\.(?:py|md|toml)$")
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9_-]*(?:\.[a-z0-9_-]+)?)")
LINK = re.compile(r"\]\(([^)#\s]+)")
GENERATED = re.compile(r"<!-- generated: (\w+) -->.*?<!-- end of \1 -->", re.DOTALL)
OTHERS = {
    "help",
    "check",
    "strict",
    "attention-backend",
    "from-literal",
    "no-deps",
    "for",
    "timeout",
    "context",
    "tag",
    "file",
    "pid",
    "nproc-per-node",
    "head",
    "address",
}
"""Flags of other programs, and one that waits for a second backend."""
NOT_FILES = re.compile(r"^owner/|^path/|/x\.py$|MACHINE")


def ids(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def prose(page: Path) -> str:
    """The text without fenced blocks."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


written_now = cache(generated)


@pytest.mark.parametrize("path", written_now(), ids=lambda path: path.name)
def test_generated_docs_are_up_to_date(path: Path) -> None:
    assert path.read_text() == written_now()[path], "run python -m scripts.generate_docs"


def test_every_option_is_in_the_configuration_page_once() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    for section in SECTIONS.values():
        for name in section.model_fields:
            option = "MODEL" if name == "model" else "--" + name.replace("_", "-")
            assert text.count(f"| `{option}` |") == 1, option


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    for name in CODE.findall(GENERATED.sub("", prose(page))):
        if PATH.match(name) and not NOT_FILES.search(name) and not name.startswith("/"):
            places = (ROOT, ROOT / "moe_serve", page.parent)
            assert any((place / name).exists() for place in places), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_option_that_a_page_names_exists(page: Path) -> None:
    kinds = [*vars(chat_command).values(), *vars(make_model).values()]
    commands = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Options)]
    every = (serve_options(), render_options(), *commands)
    known = {name for kind in every for name in spellings(kind)} | bench_flags() | OTHERS
    for name in FLAG.findall(GENERATED.sub("", page.read_text())):
        assert name.partition(".")[0].replace("_", "-") in known, f"{page.name} names --{name}"


def bench_flags() -> set[str]:
    """Flags of the benchmarks, of `moe-serve eplb`, `plan` and `doctor`, as their parsers have them."""
    paths = [*(ROOT / "bench").rglob("*.py"), Path(eplb.__file__), Path(plan.__file__), Path(doctor.__file__)]
    sources = [path.read_text() for path in paths]
    return {flag for source in sources for flag in re.findall(r'add_argument\(\s*"--([a-z0-9-]+)"', source)}


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_name_of_code_that_a_page_names_is_in_the_code(page: Path) -> None:
    """`Name`, `Name.attribute` and `function(...)`: all their words occur in the sources."""
    sources = "\n".join(path.read_text() for room in ("moe_serve", "tests", "bench") for path in words_of(room))
    words = set(re.findall(r"\w+", sources))
    for name in CODE.findall(prose(page)):
        if re.fullmatch(r"[A-Z]\w+(\.\w+)*(\(.*\))?|[a-z]\w*(_\w+)+(\(.*\))?", name):
            for word in re.findall(r"\w+", name.partition("(")[0]):
                assert word in words, f"{page.name} names {name}"


def words_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_python_in_a_page_is_python(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(block)


def test_lines_that_a_diff_adds_or_keeps_stand_in_the_file_it_names() -> None:
    blocks = re.findall(r"```diff\n--- a/(\S+)\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    for name, body in blocks:
        source = (ROOT / name).read_text()
        for line in body.splitlines():
            if not line.startswith("-") and line != "...":
                assert line[1:].strip() in source, f"{name} has no line {line[1:]!r}"


def test_the_page_names_every_floor() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    picture = text.partition("```")[2].partition("```")[0]
    missing = [room for room in FLOORS if room not in ("__init__",) and not re.search(rf"\b{room}\b", picture)]
    assert not missing


def test_readme_has_the_two_commands_and_every_subcommand_it_shows_exists() -> None:
    text = (ROOT / "README.md").read_text()
    assert "pip install . && moe-serve serve --data-parallel-size 2 --enable-expert-parallel\n" in text
    assert "pip install -e '.[test]' && pytest\n" in text
    shown = set(
        re.findall(r"\bmoe-serve ([a-z][a-z-]*)(?= )", "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)))
    )
    assert shown <= set(COMMANDS)


def test_a_generated_part_without_its_marks_is_an_error() -> None:
    assert replaced("a <!-- generated: x -->old<!-- end of x --> b", "x", "new").startswith("a <!-- generated: x -->\n")
    with pytest.raises(ValueError, match="end of x"):
        replaced("a <!-- generated: x --> b", "x", "new")


def test_types_are_shown_as_a_reader_wants_them() -> None:
    assert kind_of(int | None, []) == "number"
    assert kind_of(bool, []) == "switch"
