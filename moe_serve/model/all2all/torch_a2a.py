"""torch's all-to-all with ragged splits: a row travels once to each rank that needs it, and its K terms come back.

Because the terms are added at home in top-k order, where an expert lives cannot change a bit of the sum.

Shape letters: T rows here, N ranks, K top-k, S rows received, R received (row, expert) pairs, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moe_serve.model.all2all.base import Arrived, Sorted
from moe_serve.model.all2all.rows import add_in_order, add_parts, pack, sort_rows, unpack
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.pending import Pending


@dataclass(frozen=True, slots=True)
class _Home:
    """What the sender keeps: which pairs come back from which rank, and the weights of the sum."""

    pairs: Tensor
    num_pairs: list[int]
    weights_TK: Tensor
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Ticket:
    """`wire_order` (R,): position, among the rows sorted by expert, of each pair in the order its sender waits for."""

    home: _Home
    wire_order: Tensor
    num_pairs: list[int]


class TorchAllToAll:
    """One small exchange of counts and one of rows out, one of terms home.

    Where experts are cut by width every row goes to all ranks, and the ranks' parts of a term are added in order.
    """

    arrives: ClassVar = Sorted
    applies_weights: ClassVar[Literal["combine", "experts"]] = "combine"
    id_dtype: ClassVar[torch.dtype] = torch.int64
    exact: ClassVar[bool] = True
    padding_rows = 0

    def __init__(self, group: Group, layout: ExpertLayout, shape: DispatchShape) -> None:
        self._group, self._path = group, shape.path
        self._sharded = layout.offsets is None
        self._num_local = layout.num_local(group.rank)
        self._first_slot = layout.first_slot(group.rank)
        ends = (0,) if layout.offsets is None else layout.offsets[1:]
        self._ends_N = torch.tensor(ends, dtype=torch.int64, device=group.device)

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Arrived]:
        wanted_NTK = self._wanted(physical_ids_TK)
        home = _home(wanted_NTK, weights_TK, x_TD.dtype)
        needed_NT = wanted_NTK.any(dim=2)
        ranks, rows = needed_NT.nonzero(as_tuple=True)
        num_sent = needed_NT.sum(dim=1)
        num_received = self._group.exchange_rows(num_sent.view(-1, 1)).flatten().tolist()
        slots = physical_ids_TK[rows].masked_fill(~wanted_NTK[ranks, rows], -1)
        parts = (x_TD.index_select(0, rows), slots.to(torch.int32))
        arriving = self._group.start_all_to_all_ragged(pack(parts), num_sent.tolist(), num_received)
        return arriving.then(lambda packed: self._receive(unpack(packed, parts), num_received, home))

    def combine(self, outputs: Tensor, arrived: Arrived) -> Pending[Tensor]:
        ticket = arrived.ticket
        assert isinstance(ticket, _Ticket)
        home = ticket.home
        coming = self._group.start_all_to_all_ragged(
            outputs.index_select(0, ticket.wire_order), ticket.num_pairs, home.num_pairs
        )
        return coming.then(lambda terms: self._add_up(terms, home))

    def close(self) -> None:
        pass

    def _wanted(self, slots_TK: Tensor) -> Tensor:
        """(N, T, K) bool: does rank n compute pair (t, k)?"""
        present_TK = slots_TK >= 0
        if self._sharded:
            return present_TK.expand(self._group.size, *slots_TK.shape)
        owner_TK = torch.searchsorted(self._ends_N, slots_TK, right=True)
        ranks = torch.arange(self._group.size, device=slots_TK.device).view(-1, 1, 1)
        return (owner_TK == ranks) & present_TK

    def _receive(self, arrived: Sequence[Tensor], num_received: list[int], home: _Home) -> Sorted:
        x_SD, slots_SK = arrived
        rows, pairs, counts_e = sort_rows(x_SD, slots_SK, self._first_slot, self._num_local, self._path)
        num_pairs = [int(part.sum()) for part in torch.split(slots_SK >= 0, num_received)]
        return Sorted(rows, counts_e, _Ticket(home, pairs.argsort(), num_pairs))

    def _add_up(self, terms: Tensor, home: _Home) -> Tensor:
        """The terms that came home, put in their places (those of no expert stay zero) and added."""
        num_rows, top_k = home.weights_TK.shape
        if self._sharded:
            terms, pairs = add_parts(terms, self._group.size), home.pairs[: home.num_pairs[0]]
        else:
            pairs = home.pairs
        terms_TKD = terms.new_zeros((num_rows * top_k, terms.shape[1])).index_copy_(0, pairs, terms)
        return add_in_order(terms_TKD.view(num_rows, top_k, terms.shape[1]), home.weights_TK, home.dtype, self._path)


def _home(wanted_NTK: Tensor, weights_TK: Tensor, dtype: torch.dtype) -> _Home:
    flat = wanted_NTK.reshape(wanted_NTK.shape[0], -1)
    return _Home(flat.nonzero(as_tuple=True)[1], flat.sum(dim=1).tolist(), weights_TK, dtype)
