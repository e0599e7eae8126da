"""Sums and gathers of ranks on the CPUs of one machine, through memory that they share.

Every rank has a place of its own in a board, writes what it brings there, publishes, and reads the others' places once
they have published. There are two boards, used in turn; what is larger than a place goes piece by piece. A rank writes
to a board again only after all have published the piece that came after, so they have read what was there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_serve.base.topology import split_range
from moe_serve.parallel.collectives import Group, sum_parts
from moe_serve.parallel.process_groups import ProcessGroup
from moe_serve.parallel.shm import SharedMemory, share

PLACE_BYTES = 256 << 10
"""Of each rank in each board: what a core's own cache holds of both, its own and another's."""

SHARE_BYTES = 32 << 10
"""From here on it pays to meet twice, so that no rank adds up everything."""


class MemoryGroup(Group):
    """A group whose all_gather, all_gather_ragged and all_reduce go through memory; the rest as in any group.

    A sum is added in the order of the ranks, in float32 where the type has 16 bits, whatever its size. ConfigError or
    NoSharedMemory, on all ranks alike, where there is no memory to share.
    """

    def __init__(
        self,
        process_group: ProcessGroup,
        *,
        name: str,
        rank: int,
        ranks: Sequence[int],
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        super().__init__(
            process_group, name=name, rank=rank, ranks=ranks, device=device, timeout_seconds=timeout_seconds
        )
        self._memory: SharedMemory | None = None  # until then over the network
        self._num_published = self._turn = 0
        self._memory = share(self, 2 * self.size * PLACE_BYTES)
        self._boards: dict[torch.dtype, Tensor] = {}
        self.transport = "shm"

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks; the same bits everywhere."""
        mine = x.reshape(-1)
        out = torch.empty_like(mine)
        room = PLACE_BYTES // x.element_size()
        for first in range(0, mine.numel(), room):
            piece = mine[first : first + room]
            places = self._exchange("all_reduce", piece)
            self._add_up("all_reduce", places[:, : piece.numel()], out[first : first + room])
        return out.view(x.shape)

    def all_gather_ragged(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Everybody's rows one after the other; rank i brings sizes[i]."""
        if self._memory is None:
            return super().all_gather_ragged(x, sizes)
        row = x.shape[1:].numel()
        mine, room = x.reshape(-1), PLACE_BYTES // x.element_size()
        out = x.new_empty((sum(sizes), *x.shape[1:]))
        everything = out.view(-1)
        for first in range(0, max(sizes) * row, room):
            places = self._exchange("all_gather", mine[first : first + room])
            begin = first
            for place, size in zip(places, sizes, strict=True):
                length = min(max(size * row - first, 0), room)
                everything[begin : begin + length].copy_(place[:length])
                begin += size * row
        return out

    def close(self) -> None:
        """Leave the group; those who wait for this rank hear that it is gone. Safe to call twice."""
        super().close()
        if self._memory is not None:
            self._memory.close()
        self._memory, self._boards = None, {}

    def _add_up(self, what: str, parts: Tensor, out: Tensor) -> None:
        """Of what lies in the places; where it is much for many, each adds up a share, for all."""
        if self.size == 2 or out.numel() * out.element_size() < SHARE_BYTES:
            sum_parts(parts, out)
            return
        shares = [split_range(out.numel(), self.size, rank) for rank in range(self.size)]
        mine = slice(shares[self.rank].start, shares[self.rank].stop)
        sum_parts(parts[:, mine], parts[self.rank, mine])  # nobody else reads that part of its place
        self._meet(what)
        for part, theirs in zip(parts, shares, strict=True):
            out[theirs.start : theirs.stop].copy_(part[theirs.start : theirs.stop])

    def _exchange(self, what: str, piece: Tensor) -> Tensor:
        """Everybody's places, (ranks, elements), with all pieces there; good until the exchange after the next."""
        self._turn = 1 - self._turn
        places = self._board(self._turn, piece.dtype)
        places[self.rank, : piece.numel()].copy_(piece)
        self._meet(what)
        return places

    def _meet(self, what: str) -> None:
        assert self._memory is not None
        self._num_published += 1
        self._memory.publish(self._num_published)
        self._memory.wait(self._num_published, what)

    def _board(self, turn: int, dtype: torch.dtype) -> Tensor:
        boards = self._boards.get(dtype)
        if boards is None:
            assert self._memory is not None
            with torch.inference_mode(False):  # what is made within that mode cannot be written to outside of it
                data = self._memory.data[: 2 * self.size * PLACE_BYTES].view(dtype)
                boards = self._boards[dtype] = data.view(2, self.size, PLACE_BYTES // dtype.itemsize)
        return boards[turn]
