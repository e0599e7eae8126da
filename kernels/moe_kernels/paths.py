"""Which compiled code runs the operations: one of the paths that were built and that this processor can run.

And what an operation is made of, its memory and its call, which may be written down as they happen (recording.py).

torch must have been imported before: its threads (libgomp) are those that the compiled code uses, and a second copy
would take cores from them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path as File
from typing import Any, Protocol

import torch
from torch import Tensor

_native: Any
try:
    _native = import_module("moe_kernels.native._native")
except ImportError:
    _native = None

LINEAR, EXPERTS, ATTENTION, RMS_NORM, COMBINE, SCORES, ROTARY, SORT, GATHER, ROUTE, MOE, ADD, ARGMAX = range(13)
"""As in native/table.hpp."""
MAX_WORDS = 24
"""As in native/module.cpp: of one operation."""


class Recorder(Protocol):
    """Who writes down what happens in his thread."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...

    def next_layer(self) -> None: ...

    def apart(self, work: Callable[[Any], Tensor], given: object) -> Tensor: ...

    def between(self, work: Callable[[Any], None], given: object) -> None: ...

    def note(self, path: str, operation: int, words: tuple[int | float, ...]) -> None: ...


class _ThisThread(threading.local):
    recorder: Recorder | None = None


this_thread = _ThisThread()


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
    if this_thread.recorder is not None:
        this_thread.recorder.note(path, operation, words)
    _native.run(_indices()[path], operation, *words)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory for what an operation makes, contiguous, filled with anything; a recorder's where there is one."""
    recorder = this_thread.recorder
    return torch.empty(shape, dtype=dtype) if recorder is None else recorder.empty(shape, dtype)


def replay(path: str, lines: Tensor) -> None:
    """Run recorded operations again, `lines` (n, 1 + MAX_WORDS) int64: one call for all of them."""
    _native.replay(_indices()[path], lines.data_ptr(), lines.shape[0])


@cache
def _indices() -> dict[str, int]:
    return {name: index for index, name in enumerate(available())}
