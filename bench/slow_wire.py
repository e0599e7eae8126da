"""A worker whose rows take as long as a file says, for --worker-cls: what overlapping is worth on a slow wire."""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from moe_serve.base.commands import WorkerFacts
from moe_serve.model.all2all.base import All2All, Arrived
from moe_serve.parallel.pending import Pending
from moe_serve.worker.worker import Worker

FILE_VARIABLE = "BENCH_WIRE_FILE"
Value = TypeVar("Value")


def set_seconds_per_row(file: Path, seconds: float) -> None:
    with file.open("r+b") as opened:
        opened.write(struct.pack("d", seconds))


class SlowWire:
    """A backend whose rows go one behind the other over a wire of this rank's own, out and home alike.

    Nobody computes meanwhile: who waits sleeps.
    """

    def __init__(self, inner: All2All, seconds_per_row: mmap.mmap) -> None:
        self._inner, self._seconds_per_row, self._free_at = inner, seconds_per_row, 0.0
        self.arrives, self.applies_weights = inner.arrives, inner.applies_weights
        self.id_dtype, self.exact = inner.id_dtype, inner.exact

    @property
    def padding_rows(self) -> int:
        return self._inner.padding_rows

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Arrived]:
        self._num_rows = x_TD.shape[0]
        return self._later(self._inner.dispatch(x_TD, physical_ids_TK, weights_TK, rows_by_rank), x_TD.shape[0])

    def combine(self, outputs: Tensor, arrived: Arrived) -> Pending[Tensor]:
        return self._later(self._inner.combine(outputs, arrived), self._num_rows)

    def close(self) -> None:
        self._inner.close()

    def _later(self, pending: Pending[Value], num_rows: int) -> Pending[Value]:
        (each,) = struct.unpack("d", self._seconds_per_row[:8])
        self._free_at = there = max(self._free_at, time.perf_counter()) + each * num_rows

        def wait() -> Value:
            value = pending.wait()
            time.sleep(max(0.0, there - time.perf_counter()))
            return value

        return Pending(wait)


class OverSlowWire(Worker):
    """As any, with such a wire between its layers' rows and experts."""

    def _load(self) -> WorkerFacts:
        facts = super()._load()
        with open(os.environ[FILE_VARIABLE], "r+b") as file:
            memory = mmap.mmap(file.fileno(), 8)
        assert self._decoder is not None
        wire = SlowWire(self._decoder.all2all, memory)
        for layer in self._decoder.moe_layers():
            layer.all2all = wire
        return facts
