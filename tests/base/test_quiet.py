"""A stranger cannot fill the disk with log lines."""

from __future__ import annotations

import logging

import pytest

from moe_serve.base.quiet import QUIET_SECONDS, QuietLog


def test_a_crowd_makes_one_line_in_a_while_which_counts_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    quiet = QuietLog(logging.getLogger("test"), lambda: now)
    for number in range(1000):
        quiet.warning("dropped %d", number)
    now = QUIET_SECONDS
    quiet.warning("dropped %d", 1000)
    assert [record.getMessage() for record in caplog.records] == [
        "dropped 0",
        f"dropped 1000 (and 999 like it in the last {QUIET_SECONDS:g} s or more)",
    ]
