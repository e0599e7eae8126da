"""Expert load of the last steps, and recordings of it step by step. numpy only.

Shape letters: L layers, E logical experts; 2 is prefill and decode.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moe_serve.base.parcel import Parcel

Counts = npt.NDArray[np.int64]
MAX_RECORD_BYTES = 32 << 20
"""What one recording may hold: a dump is one message on the coordinator's link."""


@dataclass(slots=True)
class LoadWindow:
    """`size` in steps; load comes in buckets of several steps."""

    num_layers: int
    num_experts: int
    size: int
    _buckets: deque[tuple[int, Counts]] = field(default_factory=deque)
    _steps: int = 0
    _total: Counts = field(init=False)

    def __post_init__(self) -> None:
        self._total = np.zeros((self.num_layers, 2, self.num_experts), dtype=np.int64)

    @property
    def num_steps(self) -> int:
        """Steps in the window now."""
        return self._steps

    def add(self, steps: int, load: bytes) -> Counts:
        """A bucket, int64 (L, 2, E) as bytes; the oldest go once the rest fills the window. The bucket as an array."""
        counts = np.frombuffer(load, dtype=np.int64).reshape(self.num_layers, 2, self.num_experts)
        self._buckets.append((steps, counts))
        self._steps += steps
        self._total += counts
        while self._steps - self._buckets[0][0] >= self.size:
            gone, oldest = self._buckets.popleft()
            self._steps -= gone
            self._total -= oldest
        return counts

    def load(self, last_steps: int | None = None) -> Counts:
        """int64 (L, 2, E) summed over the window, or over its newest buckets with at least `last_steps` steps."""
        if last_steps is None:
            return self._total.copy()
        total = np.zeros_like(self._total)
        seen = 0
        for steps, counts in reversed(self._buckets):
            if seen >= last_steps:
                break
            total += counts
            seen += steps
        return total


@dataclass(slots=True)
class Recording:
    """Counts of single steps, until there are `limit` bytes of them. `on`: still growing."""

    on: bool = False
    steps: list[Counts] = field(default_factory=list)
    full: bool = False
    limit: int = MAX_RECORD_BYTES

    def start(self) -> None:
        """Begin anew; what was recorded before is forgotten."""
        self.on, self.full, self.steps = True, False, []

    def add(self, counts: Counts) -> None:
        """A step's (L, 2, E)."""
        total = counts.sum(axis=1)
        if (len(self.steps) + 1) * total.nbytes > self.limit:
            self.on, self.full = False, True
        else:
            self.steps.append(total)

    def dump(self, metadata: dict[str, str]) -> Parcel:
        """A safetensors file with `logical_count` int64 (steps, L, E); the steps are not copied."""
        size = sum(step.nbytes for step in self.steps)
        shape = [len(self.steps), *self.steps[0].shape]
        array = {"dtype": "I64", "shape": shape, "data_offsets": [0, size]}
        header = json.dumps({"__metadata__": metadata, "logical_count": array}).encode()
        header += b" " * (-len(header) % 8)
        data = (np.ascontiguousarray(step).data.cast("B") for step in self.steps)
        return Parcel((len(header).to_bytes(8, "little") + header, *data))
