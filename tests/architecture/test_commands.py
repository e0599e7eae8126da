"""Commands in the docs: each is understood by the parser of the real command, and a page's ranks make one world."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from moe_serve.base.config import Config, differing_fields
from moe_serve.cli.k8s import parse_render
from moe_serve.cli.plan import parse_plan
from moe_serve.cli.serve import parse_serve
from moe_serve.launch.part import node_part
from tests.support.pages import ROOT, blocks, commands

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
DEPLOYING = ROOT / "docs" / "deploying.md"
FILES = {"options.yaml": "max_num_seqs: 4\n", "placement.json": "{}"}
LOOPBACK = ("127.0.0.1", "::1", "localhost")
TOLD = [
    pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)[:60]}")
    for page in PAGES
    for block in blocks(page)
    for words in commands(block)
    if words[0] in ("serve", "plan", "k8s")
]
APART = {
    flag: block
    for flag in ("--data-parallel-rank", "--data-parallel-hybrid-lb", "--headless")
    for block in blocks(DEPLOYING)
    if flag in block
}
"""Launchers of one part each, without a supervisor."""


def parsed(words: Sequence[str]) -> object:
    """What the command makes of its words; None where it only shows something."""
    if words[-1] == "--help" or words == ["k8s", "dashboard"]:
        return None
    parsers: dict[str, Callable[[list[str]], object]] = {
        "serve": parse_serve,
        "plan": lambda rest: parse_plan(rest)[1],
        "k8s": lambda rest: parse_render(rest[1:]),
    }
    return parsers[words[0]](list(words[1:]))


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who has the files that the pages speak of, and no options in the environment."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    for name in os.environ:
        if name.startswith("MOE_SERVE_"):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("words", TOLD)
def test_a_command_in_the_docs_is_understood(words: list[str]) -> None:
    config = parsed(words)
    if isinstance(config, Config):
        config.parallel.check_built()


def test_commands_are_found_wherever_they_stand() -> None:
    assert len(APART) == 3
    assert len(TOLD) >= 15
    told = "pip install . && moe-serve serve -dp 2 \\\n    -ep   # a comment\nmoe-serve k8s dashboard > here.json\n"
    assert commands(told) == [["serve", "-dp", "2", "-ep"], ["k8s", "dashboard"]]


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("block", APART.values(), ids=APART)
def test_commands_that_are_started_apart_make_one_world(block: str) -> None:
    configs = [parse_serve(words[1:]) for words in commands(block)]
    parts = [node_part(config.parallel) for config in configs]
    first = configs[0].parallel
    assert sorted(rank for part in parts for rank in part.dp_ranks or ()) == list(range(first.data_parallel_size))
    assert [part.joins for part in parts] == [False] + [True] * (len(parts) - 1)
    for config, part in zip(configs, parts, strict=True):
        assert not differing_fields(configs[0].agreement(), config.agreement())
        assert config.parallel.data_parallel_address == "HOST0"
        assert config.parallel.coordinator_port == first.coordinator_port != 0
        assert not part.serve_http or config.server.host not in LOOPBACK, "nobody outside of its machine can ask it"
    assert sum(part.serve_http for part in parts) == first.num_frontends
