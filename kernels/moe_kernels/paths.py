"""Which compiled code runs the operations: one of the paths that were built and that this processor can run.

torch must have been imported before: its threads (libgomp) are those that the compiled code uses, and a second copy
would take cores from them.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path as File
from typing import Any

import torch  # noqa: F401 - see above

_native: Any
try:
    _native = import_module("moe_kernels.native._native")
except ImportError:
    _native = None

LINEAR, EXPERTS, ATTENTION, RMS_NORM, COMBINE, SCORES, ROTARY, SORT, GATHER, ROUTE, ARGMAX = range(11)
"""As in native/table.hpp."""


@cache
def available() -> tuple[str, ...]:
    """Names of the paths that can run here, best first; empty where nothing was compiled."""
    return () if _native is None else tuple(_native.paths())


def why_none() -> str:
    """The compiler's last line, or that there was none to say anything."""
    report = File(__file__).parent / "native" / "build.txt"
    told = report.read_text(encoding="utf-8").strip() if report.is_file() else ""
    return told.splitlines()[-1] if told else "no extension was built"


def run(path: str, operation: int, *words: int | float) -> None:
    """Run one operation on a path; `words` are addresses (0 for none), sizes, and floats.

    Whoever calls has checked shapes, types and strides, and keeps what is pointed at: nothing is checked from here on.
    """
    _native.run(_indices()[path], operation, *words)


@cache
def _indices() -> dict[str, int]:
    return {name: index for index, name in enumerate(available())}
