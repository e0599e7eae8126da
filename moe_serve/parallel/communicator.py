"""What libraries ask of an mpi4py communicator, or of a torch group, while they set up: over one of our groups.

So that none needs torch's default group, which nothing here makes.
"""

from __future__ import annotations

import msgspec
import torch

from moe_serve.parallel.collectives import Group

Told = int | bytes | bytearray | str | list["Told"] | None


class Communicator:
    """Under mpi4py's own names, and torch's for those that take a process group of NCCL.

    Objects are numbers, bytes, texts, None and lists of these; bytes arrive as bytearray.

    They travel as msgpack, since nothing that comes from another process is unpickled here.
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def Get_rank(self) -> int:
        return self._group.rank

    def Get_size(self) -> int:
        return self._group.size

    def Barrier(self) -> None:
        self.allgather(None)

    def rank(self) -> int:
        return self._group.rank

    def size(self) -> int:
        return self._group.size

    def barrier(self) -> None:
        self.allgather(None)

    def _get_backend(self, device: torch.device) -> object:
        """What holds the communicator of NCCL."""
        return self._group.process_group

    def allgather(self, told: Told) -> list[Told]:
        """Everybody's object, in order of rank."""
        group = self._group
        packed = torch.frombuffer(bytearray(msgspec.msgpack.encode(told)), dtype=torch.uint8).to(group.device)
        sizes: list[int] = group.all_gather(torch.tensor([packed.numel()], device=group.device)).tolist()
        everything = group.all_gather_ragged(packed, sizes).cpu()
        return [
            _mutable(msgspec.msgpack.decode(part.numpy().tobytes()))
            for part in torch.split_with_sizes(everything, sizes)
        ]

    def bcast(self, told: Told, root: int = 0) -> Told:
        """`root`'s object."""
        return self.allgather(told if self._group.rank == root else None)[root]


def _mutable(told: Told) -> Told:
    """DeepEP's native half takes handles as bytearray only."""
    if isinstance(told, list):
        return [_mutable(each) for each in told]
    return bytearray(told) if isinstance(told, bytes) else told
