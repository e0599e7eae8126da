"""One logging set-up for every process: role and rank in front, on stderr; coloured on a terminal, else plain."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.logging import RichHandler

LEVELS = ("debug", "info", "warning", "error")


def setup_logging(who: str, level: str = "info") -> None:
    """Configure the `moe_serve` logger of this process; `who` (for example `engine dp=1`) opens each line."""
    logger = logging.getLogger("moe_serve")
    logger.handlers[:] = [_for_terminal(who) if sys.stderr.isatty() else _for_file(who)]
    logger.setLevel(level.upper())
    logger.propagate = False


def _for_terminal(who: str) -> logging.Handler:
    handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S", markup=False)
    handler.setFormatter(logging.Formatter(f"[{who}] %(message)s"))
    return handler


def _for_file(who: str) -> logging.Handler:
    """One line per record, whatever its length: a wrapped line cannot be searched."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s [{who}] %(message)s", "%H:%M:%S"))
    return handler


class Sparingly(logging.Filter):
    """Lets `burst` records of each kind (a logger's message before its arguments) pass within `seconds`, no more.

    What was held back is told with the next one that passes. For lines that a stranger can cause at will.
    """

    def __init__(self, *, burst: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._burst, self._seconds, self._clock = burst, seconds, clock
        self._kinds: dict[object, _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record passes; the next after some that did not says how many."""
        now = self._clock()
        kind = self._kinds.setdefault((record.name, record.msg), _Kind(now))
        if now - kind.began >= self._seconds:
            kind.began, kind.passed = now, 0
        if kind.passed >= self._burst:
            kind.held_back += 1
            return False
        kind.passed += 1
        if kind.held_back:
            record.msg = f"{record.msg} (and {kind.held_back} more like it)"
            kind.held_back = 0
        return True


def limit_lines(name: str, *, burst: int, seconds: float) -> None:
    """From now on the logger of this name is Sparingly; said again, the last word counts."""
    logger = logging.getLogger(name)
    for known in [each for each in logger.filters if isinstance(each, Sparingly)]:
        logger.removeFilter(known)
    logger.addFilter(Sparingly(burst=burst, seconds=seconds))


@dataclass(slots=True)
class _Kind:
    began: float
    passed: int = 0
    held_back: int = 0
