"""The all-to-all interface: rows travel to the ranks that hold their experts, and back. Table: base.tables.ALL2ALL.

Shape letters: T rows here, K top-k, P physical experts, e local physical experts, R received rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, Protocol, TypeVar

from torch import Tensor

from moe_serve.parallel.collectives import Group

Value = TypeVar("Value")


class Pending(Generic[Value]):
    """Something under way; `wait()` returns it. Call it once."""

    def __init__(self, finish: Callable[[], Value]) -> None:
        self._finish = finish

    def wait(self) -> Value:
        return self._finish()


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Which rank of the group computes which physical expert.

    `offsets` (one per rank plus one): rank r owns slots [offsets[r], offsets[r + 1]). None: every rank holds a slice
    of the width of every expert, so each row goes to all ranks and their partial results are summed.
    """

    num_physical: int
    offsets: tuple[int, ...] | None

    def first_slot(self, rank: int) -> int:
        """The lowest slot that a rank computes."""
        return 0 if self.offsets is None else self.offsets[rank]

    def num_local(self, rank: int) -> int:
        if self.offsets is None:
            return self.num_physical
        return self.offsets[rank + 1] - self.offsets[rank]


@dataclass(frozen=True, slots=True)
class Routed:
    """What arrived. `rows` (R, D) sorted by local expert, R = counts_e.sum(); `counts_e` (e,) int64 beside them.

    A row that several local experts want appears once for each. `ticket` is private to the backend.
    """

    rows: Tensor
    counts_e: Tensor
    ticket: object


class All2All(Protocol):
    """Made once per worker: `Backend(group, layout)`. Every rank of the group calls dispatch and combine in step."""

    layout: ClassVar[Literal["flat", "padded"]]
    capturable: ClassVar[bool]
    """May run inside a CUDA graph."""
    exact: ClassVar[bool]
    """combine adds the K terms of a row in top-k order, so the placement of experts cannot change a bit."""
    pads: ClassVar[bool]
    """Ragged row counts are padded to the largest on the wire."""

    def __init__(self, group: Group, layout: ExpertLayout) -> None: ...

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Routed]:
        """Send rows to their experts. ids int64, -1 for "no expert" (sent nowhere); weights float32.

        `rows_by_rank[i]` is T of rank i; T may be 0.
        """
        ...

    def combine(self, rows: Tensor, routed: Routed) -> Pending[Tensor]:
        """Expert outputs (R, D) in the order of `routed.rows` go home; gives (T, D), weighted and summed over K."""
        ...

    def close(self) -> None:
        """Release buffers; the group stays its owner's."""
        ...
