"""What a check found: good or not, what it means, what to do. The form in which every check of the doctor answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

Level = Literal["ok", "warning", "failure"]


class Finding(msgspec.Struct, frozen=True):
    """`found` is a fact, `means` what follows from it, `do` what would mend it ("" where nothing is to be done)."""

    check: str
    level: Level
    found: str
    means: str = ""
    do: str = ""


def ok(check: str, found: str, means: str = "") -> Finding:
    return Finding(check, "ok", found, means)


def warning(check: str, found: str, means: str, do: str) -> Finding:
    return Finding(check, "warning", found, means, do)


def failure(check: str, found: str, means: str, do: str) -> Finding:
    return Finding(check, "failure", found, means, do)


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if anything failed. Warnings fail nothing."""
    return int(any(each.level == "failure" for each in findings))
