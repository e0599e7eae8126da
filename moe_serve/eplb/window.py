"""Expert load of the last steps, and recordings of it step by step. numpy only.

Shape letters: L layers, E logical experts; 2 is prefill and decode.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moe_serve.base.parcel import Parcel
from moe_serve.eplb.saving import WindowPart

Counts = npt.NDArray[np.int64]
MAX_RECORD_BYTES = 32 << 20
"""What one recording may hold: a dump is one message on the coordinator's link."""
MAX_PARTS = 8


@dataclass(slots=True)
class Bucket:
    """Counts of some steps, (L, 2, E), and what the steps and each rank's experts took; none if that is not known."""

    steps: int
    counts: Counts
    step_seconds: float
    expert_seconds_R: Sequence[float]


@dataclass(slots=True)
class LoadWindow:
    """`size` in steps; load comes in buckets of several steps."""

    num_layers: int
    num_experts: int
    size: int
    _buckets: deque[Bucket] = field(default_factory=deque)
    _steps: int = 0
    _total: Counts = field(init=False)
    _seconds_hold: bool = True

    def __post_init__(self) -> None:
        self._total = np.zeros((self.num_layers, 2, self.num_experts), dtype=np.int64)

    @property
    def num_steps(self) -> int:
        """Steps in the window now."""
        return self._steps

    def add(self, steps: int, load: bytes, step_seconds: float = 0.0, expert_seconds_R: Sequence[float] = ()) -> Counts:
        """A bucket, int64 (L, 2, E) as bytes; the oldest go once the rest fills the window. The bucket as an array."""
        counts = np.frombuffer(load, dtype=np.int64).reshape(self.num_layers, 2, self.num_experts)
        self._buckets.append(Bucket(steps, counts, step_seconds, expert_seconds_R if self._seconds_hold else ()))
        self._seconds_hold = True
        self._steps += steps
        self._total += counts
        while self._steps - self._buckets[0].steps >= self.size:
            oldest = self._buckets.popleft()
            self._steps -= oldest.steps
            self._total -= oldest.counts
        return counts

    def load(self, last_steps: int | None = None) -> Counts:
        """int64 (L, 2, E) summed over the window, or over its newest buckets with at least `last_steps` steps."""
        if last_steps is None:
            return self._total.copy()
        total = np.zeros_like(self._total)
        seen = 0
        for bucket in reversed(self._buckets):
            if seen >= last_steps:
                break
            total += bucket.counts
            seen += bucket.steps
        return total

    def forget_seconds(self) -> None:
        """Experts have moved: what the ranks took before, and in the bucket that is coming, says nothing any more."""
        self._seconds_hold = False
        for bucket in self._buckets:
            bucket.expert_seconds_R = ()

    def parts(self) -> list[WindowPart]:
        """The window in up to MAX_PARTS parts of neighbouring buckets, oldest first."""
        buckets = [bucket for bucket in self._buckets if bucket.steps]
        size = max(1, -(-len(buckets) // MAX_PARTS))
        return [_part(buckets[first : first + size]) for first in range(0, len(buckets), size)]


def _part(buckets: Sequence[Bucket]) -> WindowPart:
    """Several buckets as one; seconds only if all of them have some."""
    load_LE = np.sum([bucket.counts.sum(axis=1) for bucket in buckets], axis=0).astype(np.float64)
    told = all(bucket.expert_seconds_R for bucket in buckets)
    seconds_R = np.sum([bucket.expert_seconds_R for bucket in buckets], axis=0).tolist() if told else []
    steps, step_seconds = (sum(each) for each in zip(*((b.steps, b.step_seconds) for b in buckets), strict=True))
    return WindowPart(int(steps), load_LE, step_seconds, seconds_R)


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
