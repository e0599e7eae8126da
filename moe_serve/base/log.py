"""One logging set-up for every process: role and rank in front, on stderr; coloured on a terminal, else plain."""

from __future__ import annotations

import logging
import sys

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
