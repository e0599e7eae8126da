"""Log lines open with role and rank, one line per record, on standard error."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from moe_serve.base.log import LEVELS, limit_lines, setup_logging


@pytest.fixture(autouse=True)
def logger() -> Iterator[logging.Logger]:
    """The package's logger, afterwards as it was."""
    found = logging.getLogger("moe_serve")
    before = found.handlers[:], found.level, found.propagate
    yield found
    found.handlers[:], found.level, found.propagate = before


def test_a_line_says_when_how_bad_and_who(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("engine dp=1")
    logging.getLogger("moe_serve.engine.core").warning("%d blocks left", 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING \[engine dp=1\] 3 blocks left\n", err)


def test_a_long_record_stays_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("api")
    logging.getLogger("moe_serve").info("x" * 5000)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("level", LEVELS)
def test_the_level_decides_what_is_said(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("api", level)
    for name in LEVELS:
        logging.getLogger("moe_serve.test").log(getattr(logging, name.upper()), "said %s", name)
    said = re.findall(r"said (\w+)", capsys.readouterr().err)
    assert said == list(LEVELS[LEVELS.index(level) :])


def test_setting_up_twice_does_not_say_things_twice(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("api")
    setup_logging("worker dp=0 tp=1")
    logging.getLogger("moe_serve").error("once")
    assert capsys.readouterr().err.count("once") == 1


def test_a_limit_of_lines_that_is_set_again_replaces_the_first(caplog: pytest.LogCaptureFixture) -> None:
    name = "moe_serve.a_door"
    try:
        for burst in (1, 3):
            limit_lines(name, burst=burst, seconds=60)
        for _ in range(5):
            logging.getLogger(name).warning("knock")
        assert caplog.messages == ["knock"] * 3
    finally:
        logging.getLogger(name).filters.clear()
