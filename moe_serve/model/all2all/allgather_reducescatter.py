"""The default backend: gather everybody's rows, compute what is ours, reduce-scatter the sums. Runs anywhere.

Shape letters: T rows here, A rows of all ranks, K top-k, R received rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moe_serve.model.all2all.base import ExpertLayout, Pending, Routed
from moe_serve.model.all2all.rows import add_to_rows, pack, sort_by_expert, unpack
from moe_serve.parallel.collectives import Group


@dataclass(frozen=True, slots=True)
class _Ticket:
    pairs: Tensor
    weights_AK: Tensor
    rows_by_rank: tuple[int, ...]
    dtype: torch.dtype


class AllGatherReduceScatter:
    """Two exchanges per layer whose sizes all ranks know beforehand. Partial sums travel in the model's type."""

    layout: ClassVar[Literal["flat", "padded"]] = "flat"
    capturable: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    pads: ClassVar[bool] = False

    def __init__(self, group: Group, layout: ExpertLayout) -> None:
        self._group = group
        self._num_local = layout.num_local(group.rank)
        self._first_slot = layout.first_slot(group.rank)

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Routed]:
        if self._group.size == 1:
            routed = self._route((x_TD, physical_ids_TK, weights_TK), rows_by_rank)
            return Pending(lambda: routed)
        parts = (x_TD, physical_ids_TK.to(torch.int32), weights_TK)
        gathered = self._group.start_all_gather_ragged(pack(parts), rows_by_rank)
        return Pending(lambda: self._route(unpack(gathered.wait(), parts), rows_by_rank))

    def combine(self, rows: Tensor, routed: Routed) -> Pending[Tensor]:
        ticket = routed.ticket
        assert isinstance(ticket, _Ticket)
        sums_AD = add_to_rows(rows, ticket.pairs, ticket.weights_AK, ticket.dtype)
        return Pending(self._group.start_reduce_scatter_ragged(sums_AD, ticket.rows_by_rank).wait)

    def close(self) -> None:
        pass

    def _route(self, arrived: Sequence[Tensor], rows_by_rank: Sequence[int]) -> Routed:
        x_AD, slots_AK, weights_AK = arrived
        pairs, counts_e = sort_by_expert(slots_AK, self._first_slot, self._num_local)
        ticket = _Ticket(pairs, weights_AK, tuple(rows_by_rank), x_AD.dtype)
        return Routed(x_AD[pairs // slots_AK.shape[1]], counts_e, ticket)
