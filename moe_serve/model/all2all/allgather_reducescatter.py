"""Gather everybody's rows, compute what is ours, reduce-scatter the sums. Runs anywhere.

Shape letters: T rows here, A rows of all ranks, K top-k, R received rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moe_serve.model.all2all.base import Arrived, Sorted
from moe_serve.model.all2all.rows import GatheredTicket, add_to_rows, pack, sort_gathered, unpack
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.pending import Pending


class AllGatherReduceScatter:
    """Two exchanges per layer whose sizes all ranks know beforehand. Partial sums travel in the model's type."""

    arrives: ClassVar = Sorted
    applies_weights: ClassVar[Literal["combine", "experts"]] = "combine"
    id_dtype: ClassVar[torch.dtype] = torch.int32
    exact: ClassVar[bool] = False
    padding_rows = 0

    def __init__(self, group: Group, layout: ExpertLayout, shape: DispatchShape) -> None:
        self._group = group
        self._layout, self._path = layout, shape.path

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Arrived]:
        parts = (x_TD, physical_ids_TK, weights_TK)
        if self._group.size == 1:
            alone = self._sorted(parts, rows_by_rank)
            return Pending(lambda: alone)
        gathered = self._group.start_all_gather_ragged(pack(parts), rows_by_rank)
        return gathered.then(lambda packed: self._sorted(unpack(packed, parts), rows_by_rank))

    def _sorted(self, parts: Sequence[Tensor], rows_by_rank: Sequence[int]) -> Sorted:
        return sort_gathered(parts, rows_by_rank, self._layout, self._group.rank, self._path)

    def combine(self, outputs: Tensor, arrived: Arrived) -> Pending[Tensor]:
        ticket = arrived.ticket
        assert isinstance(ticket, GatheredTicket)
        sums_AD = add_to_rows(outputs, ticket.pairs, ticket.weights_AK, ticket.dtype, self._path)
        return self._group.start_reduce_scatter_ragged(sums_AD, ticket.rows_by_rank)

    def close(self) -> None:
        pass
