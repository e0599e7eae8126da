"""The all-to-all interface: rows travel to the ranks that hold their experts, and back. Table: base.tables.ALL2ALL.

Shape letters: T rows here, K top-k, e local physical experts, R received rows, C capacity per expert, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.pending import Pending


@dataclass(frozen=True, slots=True)
class Sorted:
    """`rows` (R, D) by local expert, R = counts_e.sum(); `counts_e` (e,) int64 beside them.

    A row that several local experts want appears once for each. `weights` (R,) float32 where the experts apply them.
    Of all forms: `ticket` is private to the backend; `scales` belong to rows that travelled quantised (None: they did
    not), as moe_kernels.quantise has both.
    """

    rows: Tensor
    counts_e: Tensor
    ticket: object
    weights: Tensor | None = None
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Batched:
    """`rows` (e, C, D): expert i's are the first counts_e[i] of rows[i]; behind them is what nobody reads.

    `counts_e` (e,) stays on the device: no size depends on it, so the host need not wait for it. `weights` (e, C) as
    in Sorted.
    """

    rows: Tensor
    counts_e: Tensor
    ticket: object
    weights: Tensor | None = None
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RankMajor:
    """`rows` (R, D) in the order of the ranks they came from, each once.

    `ids_RK` local experts of each row, -1 for "none here"; `weights_RK` float32. The experts apply the weights and add
    up a row's terms, so what goes back is (R, D).
    """

    rows: Tensor
    ids_RK: Tensor
    weights_RK: Tensor
    ticket: object
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """`rows` (A, D) of all ranks where they lie, and `terms` (A, K, D) where what is computed is to be written.

    `slots` (A, K): place [a, k] is for what row a's k-th slot's expert makes of the row, if that is here: the first
    local expert has slot `first_slot`. Other places are other ranks'. What goes back is `terms`.
    """

    rows: Tensor
    slots: Tensor
    first_slot: int
    terms: Tensor
    ticket: object
    scales: Tensor | None = None


Arrived = Sorted | Batched | RankMajor | Placed
ArrivedForm = type[Sorted] | type[Batched] | type[RankMajor] | type[Placed]


class All2All(Protocol):
    """Made once per worker: `Backend(group, layout, shape)`. Every rank calls dispatch and combine in step.

    What it can carry at all stands in all2all.limits.LIMITS and was checked before.
    """

    arrives: ClassVar[ArrivedForm]
    applies_weights: ClassVar[Literal["combine", "experts"]]
    """Who multiplies an expert's output with the router's weight."""
    id_dtype: ClassVar[torch.dtype]
    """Type of the ids that dispatch wants."""
    exact: ClassVar[bool]
    """combine adds the K terms of a row in top-k order, so the placement of experts cannot change a bit."""
    padding_rows: int
    """Rows without a token that this rank has sent out so far, to fill its share up; 0 where nothing is padded."""

    def __init__(self, group: Group, layout: ExpertLayout, shape: DispatchShape) -> None: ...

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Arrived]:
        """Send rows to their experts. ids of `id_dtype`, -1 for "no expert" (sent nowhere); weights float32.

        `rows_by_rank[i]` is T of rank i, at most `shape.max_rows`; T may be 0.
        """
        ...

    def combine(self, outputs: Tensor, arrived: Arrived) -> Pending[Tensor]:
        """What the experts made of `arrived`, in its order, goes home; gives (T, D), weighted and summed over K."""
        ...

    def close(self) -> None:
        """Release buffers; the group stays its owner's."""
        ...
