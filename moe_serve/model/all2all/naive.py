"""The plainest backend: every rank broadcasts its rows, and everybody gets the sum of everything. To compare with.

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


class Naive:
    """One broadcast per rank on the way out, one all-reduce over all rows on the way home."""

    arrives: ClassVar = Sorted
    applies_weights: ClassVar[Literal["combine", "experts"]] = "combine"
    id_dtype: ClassVar[torch.dtype] = torch.int32
    exact: ClassVar[bool] = False
    padding_rows = 0

    def __init__(self, group: Group, layout: ExpertLayout, shape: DispatchShape) -> None:
        self._group = group
        self._layout = layout

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Arrived]:
        parts = (x_TD, physical_ids_TK, weights_TK)
        own = pack(parts)
        transfers = []
        for source, count in enumerate(rows_by_rank):
            if count:
                rows = own if source == self._group.rank else own.new_empty((count, own.shape[1]))
                transfers.append(self._group.start_broadcast(rows, source))

        def arrived() -> Sorted:
            packed = torch.cat([own[:0], *(transfer.wait() for transfer in transfers)])
            return sort_gathered(unpack(packed, parts), rows_by_rank, self._layout, self._group.rank)

        return Pending(arrived)

    def combine(self, outputs: Tensor, arrived: Arrived) -> Pending[Tensor]:
        ticket = arrived.ticket
        assert isinstance(ticket, GatheredTicket)
        sums_AD = add_to_rows(outputs, ticket.pairs, ticket.weights_AK, torch.float32)
        first = sum(ticket.rows_by_rank[: self._group.rank])
        own = slice(first, first + ticket.rows_by_rank[self._group.rank])
        return Pending(lambda: self._group.all_reduce(sums_AD)[own].to(ticket.dtype))

    def close(self) -> None:
        pass
