"""One logging set-up for every process: rich, readable lines with role and rank in front, on stderr."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler

LEVELS = ("debug", "info", "warning", "error")


def setup_logging(who: str, level: str = "info") -> None:
    """Configure the `moe_serve` logger of this process; `who` (for example `engine dp=1`) opens each line."""
    console = Console(stderr=True, soft_wrap=True)
    handler = RichHandler(
        console=console, show_path=False, rich_tracebacks=False, log_time_format="%H:%M:%S", markup=False
    )
    handler.setFormatter(logging.Formatter(f"[{who}] %(message)s"))
    logger = logging.getLogger("moe_serve")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
