"""Rows through memory that the ranks of a machine share: written once, read where they lie; terms are written home.

Every rank knows how many rows each brings, so places follow from that and nothing is counted or packed:

    rows      | rank 0's T rows | rank 1's | ...    A in all; experts read those that they want
    slots     | K for each of them                  from which every rank sees what is wanted of it
    results   | K x D for each of them              each written by the expert that computed it, read by its home

There are two such buffers, used in turn. A rank writes to one again only after all have published their part of an
exchange that came after, so they have read what was there. Exchanges that do not fit go over the network's way.

Shape letters: T rows here, A rows of all ranks, N ranks, K top-k, R (row, expert) pairs, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor

from moe_serve.base.errors import ConfigError
from moe_serve.base.tables import ALL2ALL
from moe_serve.model.all2all.base import All2All, Arrived, ArrivedForm, Placed, RankMajor
from moe_serve.model.all2all.rows import add_in_order
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout
from moe_serve.parallel.collectives import Group, sum_parts
from moe_serve.parallel.pending import Pending
from moe_serve.parallel.shm import SharedMemory, share

MOST_BYTES = 256 << 20
"""Of all ranks together; larger exchanges go the other way."""
ALIGNMENT = 64
Value = TypeVar("Value")


class SharedMemoryAllToAll:
    """A number that each rank publishes out and one home, per layer; no exchange of counts.

    Where experts are cut by width, rows arrive as RankMajor, and a rank's sum for each row goes home instead of its
    terms, as with allgather_reducescatter; what does not fit arrives as it does with the network's way. At most two
    exchanges may be under way at a time. `most_bytes` for both buffers; `num_spilled` exchanges have not fitted.
    """

    arrives: ClassVar[ArrivedForm] = Placed
    applies_weights: ClassVar[Literal["combine", "experts"]] = "combine"
    id_dtype: ClassVar[torch.dtype] = torch.int32
    exact: ClassVar[bool] = True
    padding_rows = 0

    def __init__(
        self, group: Group, layout: ExpertLayout, shape: DispatchShape, *, most_bytes: int = MOST_BYTES
    ) -> None:
        if group.device.type != "cpu":
            raise ConfigError(f"--all2all-backend shm is for ranks on CPUs, and this one is on {group.device}")
        self.num_spilled, self._path = 0, shape.path
        self._rank = group.rank
        self._first_slot = layout.first_slot(group.rank)
        self._sharded = layout.offsets is None
        # Of the same bits, or an answer would depend on which of its steps were large.
        spill = "allgather_reducescatter" if self._sharded else "torch_a2a"
        self._spill = cast(type[All2All], ALL2ALL.load(spill))(group, layout, shape)
        row = _RowBytes(shape, sharded=self._sharded)
        self._capacity = min(shape.max_rows * group.size, most_bytes // 2 // row.total) if group.size > 1 else 0
        self._buffers: list[_Buffer] = []
        self._memory: SharedMemory | None = None
        if self._capacity:
            num_bytes = row.buffer_bytes(self._capacity)
            self._memory = _shared(group, 2 * num_bytes)
            halves = self._memory.data[: 2 * num_bytes].view(2, num_bytes)
            self._buffers = [_Buffer.of(half, row, self._capacity) for half in halves]
        self._num_exchanges = self._num_published = 0

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Arrived]:
        num_rows = sum(rows_by_rank)
        if not 0 < num_rows <= self._capacity:
            self.num_spilled += num_rows > 0
            return self._spill.dispatch(x_TD, physical_ids_TK.to(self._spill.id_dtype), weights_TK, rows_by_rank)
        buffer = self._buffers[self._num_exchanges % 2].first(num_rows, sharded=self._sharded)
        self._num_exchanges += 1
        first = sum(rows_by_rank[: self._rank])
        mine = slice(first, first + x_TD.shape[0])
        assert x_TD.dtype == buffer.rows.dtype
        buffer.rows[mine].copy_(x_TD)
        buffer.slots[mine].copy_(physical_ids_TK)
        if self._sharded:
            buffer.weights[mine].copy_(weights_TK)
        return self._publish("dispatch", lambda: self._arrived(_Sent(buffer, mine, physical_ids_TK, weights_TK)))

    def combine(self, outputs: Tensor, arrived: Arrived) -> Pending[Tensor]:
        sent = arrived.ticket
        if not isinstance(sent, _Sent):
            return self._spill.combine(outputs, arrived)
        buffer = sent.buffer
        if self._sharded:
            buffer.results[self._rank].copy_(outputs)
            return self._publish("combine", lambda: sum_parts(buffer.results[:, sent.mine]))
        return self._publish("combine", lambda: _add_terms(sent, self._path))

    def close(self) -> None:
        self._spill.close()
        if self._memory is not None:
            self._memory.close()
        self._memory, self._buffers, self._capacity = None, [], 0

    def _publish(self, what: str, finish: Callable[[], Value]) -> Pending[Value]:
        """What this rank has written is there for the others; `finish` once theirs is."""
        memory = self._memory
        assert memory is not None
        self._num_published += 1
        number = self._num_published
        memory.publish(number)

        def wait() -> Value:
            memory.wait(number, what)
            return finish()

        return Pending(wait, lambda: memory.have_come(number))

    def _arrived(self, sent: _Sent) -> Arrived:
        buffer = sent.buffer
        if self._sharded:
            return RankMajor(buffer.rows, buffer.slots, buffer.weights, sent)
        return Placed(buffer.rows, buffer.slots, self._first_slot, buffer.results, sent)


class _RowBytes:
    """What a row of any rank takes in a buffer, part after part."""

    def __init__(self, shape: DispatchShape, *, sharded: bool) -> None:
        self.dtype: torch.dtype = getattr(torch, shape.dtype)
        self.hidden, self.top_k = shape.hidden, shape.top_k
        self.num_results = shape.num_ranks if sharded else shape.top_k
        row = self.hidden * self.dtype.itemsize
        self.parts = (row, 4 * self.top_k, 4 * self.top_k if sharded else 0, row * self.num_results)
        self.total = sum(self.parts)

    def places(self, num_rows: int) -> list[slice]:
        """Of the parts of a buffer for so many rows, in bytes."""
        places, first = [], 0
        for part in self.parts:
            places.append(slice(first, first + part * num_rows))
            first += -(-part * num_rows // ALIGNMENT) * ALIGNMENT
        return places

    def buffer_bytes(self, num_rows: int) -> int:
        return sum(-(-part * num_rows // ALIGNMENT) * ALIGNMENT for part in self.parts)


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Views of one buffer: `rows` (A, D), `slots` (A, K), `weights` (A, K) where experts are cut by width, and
    `results` (A, K, D), or (N, A, D) where they are cut."""

    rows: Tensor
    slots: Tensor
    weights: Tensor
    results: Tensor

    @classmethod
    def of(cls, memory: Tensor, row: _RowBytes, num_rows: int) -> _Buffer:
        """For as many rows as there is room for; results in one line."""
        rows, slots, weights, results = (memory[place] for place in row.places(num_rows))
        return cls(
            rows.view(row.dtype).view(num_rows, row.hidden),
            slots.view(torch.int32).view(num_rows, row.top_k),
            weights.view(torch.float32).view(num_rows, -1) if len(weights) else weights,
            results.view(row.dtype).view(num_rows * row.num_results, row.hidden),
        )

    def first(self, num_rows: int, *, sharded: bool) -> _Buffer:
        """The part that an exchange of so many rows uses."""
        num_results = self.results.shape[0] // self.rows.shape[0]
        shape = (num_results, num_rows, -1) if sharded else (num_rows, num_results, -1)
        results = self.results[: num_rows * num_results].view(shape)
        return _Buffer(self.rows[:num_rows], self.slots[:num_rows], self.weights[:num_rows], results)


@dataclass(frozen=True, slots=True)
class _Sent:
    """What this rank has brought: `mine` among all rows, and for the sum at home which slots and weights."""

    buffer: _Buffer
    mine: slice
    slots_TK: Tensor
    weights_TK: Tensor


def _add_terms(sent: _Sent, path: str | None) -> Tensor:
    terms_TKD = sent.buffer.results[sent.mine]
    missing_TK = sent.slots_TK < 0
    if missing_TK.any():  # nobody has written these; what lies there is older
        terms_TKD = terms_TKD.masked_fill(missing_TK.unsqueeze(-1), 0)
    return add_in_order(terms_TKD, sent.weights_TK, terms_TKD.dtype, path)


def _shared(group: Group, num_bytes: int) -> SharedMemory:
    try:
        return share(group, num_bytes)
    except ConfigError as error:
        raise ConfigError(f"--all2all-backend shm: {error}; choose auto, or a backend that uses the network") from error
