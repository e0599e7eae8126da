"""The padded form in plain torch: buffers of the worst case, whatever the router chose, so that no row is ever dropped.

What low-latency kernels do on GPUs, where it keeps the host out of a layer. Every rank sends as many rows as the one
that has most in this step (all know that from the step plan), and each expert has room for all of them; the largest
step there can be would be as correct and cost as much in every small one. Here it serves to exercise the form.

    on the wire, out     rank 0's T rows, filled up to m | rank 1's | ...            S = N x m
    for the experts      expert 0: C = S places | expert 1 | ...  | one for pairs of no expert here
    on the wire, home    to rank 0: m x K terms | to rank 1 | ...

Shape letters: T rows here, N ranks, S rows of all ranks with their padding, K top-k, e local physical experts,
C capacity per expert, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from moe_serve.model.all2all.base import Arrived, Batched
from moe_serve.model.all2all.rows import add_in_order, add_parts, pack, unpack
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.pending import Pending


@dataclass(frozen=True, slots=True)
class _Home:
    """What the sender keeps: which rank computes each pair (0 for none), and the weights of the sum."""

    owner_TK: Tensor
    weights_TK: Tensor
    dtype: torch.dtype
    padded: int
    """Rows of each rank on the wire."""


@dataclass(frozen=True, slots=True)
class _Ticket:
    """`place_SK`: where a pair lies among the experts' places, one behind the last if it is not computed here."""

    home: _Home
    place_SK: Tensor


class TorchPadded:
    """A gather of padded rows out, an exchange of padded terms home; the terms are added in top-k order."""

    arrives: ClassVar = Batched
    applies_weights: ClassVar[Literal["combine", "experts"]] = "combine"
    id_dtype: ClassVar[torch.dtype] = torch.int64
    exact: ClassVar[bool] = True

    def __init__(self, group: Group, layout: ExpertLayout, shape: DispatchShape) -> None:
        self.padding_rows = 0
        self._group, self._path = group, shape.path
        self._max_rows = shape.max_rows
        self._sharded = layout.offsets is None
        self._num_local = layout.num_local(group.rank)
        self._first_slot = layout.first_slot(group.rank)
        ends = (0,) if layout.offsets is None else layout.offsets[1:]
        self._ends_N = torch.tensor(ends, dtype=torch.int64, device=group.device)

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Arrived]:
        padded = max(rows_by_rank)
        assert padded <= self._max_rows, f"{padded} rows, but a step has at most {self._max_rows}"
        owner_TK = torch.searchsorted(self._ends_N, physical_ids_TK, right=True)
        home = _Home(owner_TK, weights_TK, x_TD.dtype, padded)
        missing = padded - x_TD.shape[0]
        self.padding_rows += missing
        parts = (
            functional.pad(x_TD, (0, 0, 0, missing)),
            functional.pad(physical_ids_TK, (0, 0, 0, missing), value=-1),
        )
        gathered = self._group.start_all_gather_ragged(pack(parts), [padded] * self._group.size)
        return gathered.then(lambda packed: self._batch(unpack(packed, parts), home))

    def combine(self, outputs: Tensor, arrived: Arrived) -> Pending[Tensor]:
        ticket = arrived.ticket
        assert isinstance(ticket, _Ticket)
        home, hidden = ticket.home, outputs.shape[-1]
        # One row of zeros behind the experts' places: the term of a pair that is not computed here.
        outputs = functional.pad(outputs.reshape(-1, hidden), (0, 0, 0, 1))
        terms = outputs.index_select(0, ticket.place_SK.flatten())
        counts = [home.padded * ticket.place_SK.shape[1]] * self._group.size
        return self._group.start_all_to_all_ragged(terms, counts, counts).then(lambda came: self._add_up(came, home))

    def close(self) -> None:
        pass

    def _batch(self, arrived: Sequence[Tensor], home: _Home) -> Batched:
        """Every expert's rows in the order in which they came, without the host knowing how many."""
        x_SD, slots_SK = arrived
        capacity, top_k = slots_SK.shape
        local_SK = slots_SK - self._first_slot
        here_SK = (slots_SK >= 0) & (local_SK >= 0) & (local_SK < self._num_local)
        local_SK = local_SK.where(here_SK, self._num_local)
        wanted_eS = (torch.arange(self._num_local, device=x_SD.device)[:, None, None] == local_SK.T).any(dim=1)
        before_eS = functional.pad(wanted_eS.cumsum(dim=1) - 1, (0, 0, 0, 1))
        places_SK = local_SK * capacity + before_eS.gather(0, local_SK.T).T
        place_SK = places_SK.where(here_SK, self._num_local * capacity)
        rows = x_SD.new_zeros((self._num_local * capacity + 1, x_SD.shape[1]))
        rows.index_copy_(0, place_SK.flatten(), x_SD.repeat_interleave(top_k, dim=0))
        batched = rows[:-1].view(self._num_local, capacity, x_SD.shape[1])
        return Batched(batched, wanted_eS.sum(dim=1), _Ticket(home, place_SK))

    def _add_up(self, came: Tensor, home: _Home) -> Tensor:
        """The terms of this rank's own rows, each from the rank that computed it."""
        (num_rows, top_k), hidden = home.weights_TK.shape, came.shape[-1]
        num_parts, owner_TK = self._group.size, home.owner_TK
        if self._sharded:
            came, num_parts, owner_TK = add_parts(came, num_parts), 1, torch.zeros_like(owner_TK)
        terms = came.view(num_parts, home.padded, top_k, hidden)[:, :num_rows]
        rows_TK = torch.arange(num_rows, device=came.device)[:, None]
        terms_TKD = terms[owner_TK, rows_TK, torch.arange(top_k, device=came.device)]
        return add_in_order(terms_TKD, home.weights_TK, home.dtype, self._path)
