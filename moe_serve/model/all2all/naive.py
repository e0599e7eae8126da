"""The plainest backend: every rank broadcasts its rows, and everybody gets the sum of everything. To compare with.

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
    own_rows: slice
    dtype: torch.dtype


class Naive:
    """One broadcast per rank on the way out, one all-reduce over all rows on the way home."""

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
        parts = (x_TD, physical_ids_TK.to(torch.int32), weights_TK)
        own = pack(parts)
        transfers = []
        for source, count in enumerate(rows_by_rank):
            if count:
                rows = own if source == self._group.rank else own.new_empty((count, own.shape[1]))
                transfers.append(self._group.start_broadcast(rows, source))

        def arrived() -> Routed:
            packed = [own[:0], *(transfer.wait() for transfer in transfers)]
            return self._route(unpack(torch.cat(packed), parts), rows_by_rank)

        return Pending(arrived)

    def combine(self, rows: Tensor, routed: Routed) -> Pending[Tensor]:
        ticket = routed.ticket
        assert isinstance(ticket, _Ticket)
        sums_AD = add_to_rows(rows, ticket.pairs, ticket.weights_AK, torch.float32)
        return Pending(lambda: self._group.all_reduce(sums_AD)[ticket.own_rows].to(ticket.dtype))

    def close(self) -> None:
        pass

    def _route(self, arrived: Sequence[Tensor], rows_by_rank: Sequence[int]) -> Routed:
        x_AD, slots_AK, weights_AK = arrived
        pairs, counts_e = sort_by_expert(slots_AK, self._first_slot, self._num_local)
        first = sum(rows_by_rank[: self._group.rank])
        own_rows = slice(first, first + rows_by_rank[self._group.rank])
        return Routed(x_AD[pairs // slots_AK.shape[1]], counts_e, _Ticket(pairs, weights_AK, own_rows, x_AD.dtype))
