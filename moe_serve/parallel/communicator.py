"""What libraries ask of an mpi4py communicator, of a torch group, or of a group of their own: over one of our groups.

So that none needs torch's default group, which nothing here makes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group

from moe_serve.base.errors import EngineError
from moe_serve.parallel.collectives import Group

Told = int | bytes | bytearray | str | list["Told"] | None


class Communicator:
    """Under mpi4py's own names, and torch's for those that take a process group of NCCL.

    Objects are numbers, bytes, texts, None and lists of these.
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def Get_rank(self) -> int:
        return self._group.rank

    def Get_size(self) -> int:
        return self._group.size

    def Barrier(self) -> None:
        gather(self._group, None)

    def rank(self) -> int:
        return self._group.rank

    def size(self) -> int:
        return self._group.size

    def barrier(self) -> None:
        gather(self._group, None)

    def _get_backend(self, device: torch.device) -> object:
        """What holds the communicator of NCCL."""
        return self._group.process_group

    def allgather(self, told: Told) -> list[Told]:
        """Everybody's object, in order of rank."""
        return gather(self._group, told)

    def bcast(self, told: Told, root: int = 0) -> Told:
        """`root`'s object."""
        return self.allgather(told if self._group.rank == root else None)[root]

    def Split(self, color: int, key: int) -> Communicator:
        """This one, for libraries that split what they use whole; EngineError where it would be parted."""
        everybody = gather(self._group, [color, key])
        if everybody != [[color, rank] for rank in range(self._group.size)]:
            raise EngineError(f"group {self._group.name!r} of {self._group.size} ranks cannot be split: {everybody}")
        return self


class MutableCommunicator(Communicator):
    """Whose bytes arrive as bytearray: DeepEP's native half takes handles as nothing else."""

    def allgather(self, told: Told) -> list[Told]:
        return [_mutable(each) for each in super().allgather(told)]


def _mutable(told: Told) -> Told:
    if isinstance(told, list):
        return [_mutable(each) for each in told]
    return bytearray(told) if isinstance(told, bytes) else told


class ParallelGroup:
    """As pplx_garden.distributed.ParallelGroup, as far as its all-to-all asks; `members`: of the group's own ranks.

    Objects as Communicator's, or dataclasses of these, which are taken for the caller's class. Where there are
    `members` every rank of the group calls, each for the place it is in.
    """

    def __init__(self, group: Group, members: Sequence[int] | None = None) -> None:
        self._group = group
        self._members = list(range(group.size) if members is None else members)

    @property
    def rank(self) -> int:
        return self._members.index(self._group.rank)

    @property
    def size(self) -> int:
        return len(self._members)

    def barrier(self) -> None:
        gather(self._group, None)

    def all_gather_object(self, told: Any) -> list[Any]:
        """The members' objects, in order."""
        kind: Any = type(told) if dataclasses.is_dataclass(told) else None
        fields = told if kind is None else [getattr(told, field.name) for field in dataclasses.fields(told)]
        everybody: list[Any] = gather(self._group, fields)
        mine = [everybody[member] for member in self._members]
        return mine if kind is None else [kind(*each) for each in mine]


class _HostGroup(torch.distributed.ProcessGroup):
    """torch's process group as far as it exchanges rows of bytes of the host, one with each rank."""

    def __init__(self, group: Group) -> None:
        super().__init__(group.rank, group.size)  # type: ignore[call-arg]
        self._group = group

    def getBackendName(self) -> str:
        return "rows of a group"

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], options: object = None
    ) -> torch.distributed.Work:
        assert output_splits == input_splits == [1] * self._group.size
        output.copy_(self._group.exchange_rows(input.to(self._group.device)))
        return _Done()


class _Done(torch.distributed.Work):
    def wait(self, timeout: object = None) -> bool:
        return True


@contextmanager
def registered(group: Group) -> Iterator[str]:
    """A name under which native code finds a torch process group that exchanges over this group, while this lasts."""
    name = f"moe-serve {group.name} {id(group)}"
    host_group = _HostGroup(group)
    _register_process_group(name, host_group)  # type: ignore[arg-type]
    try:
        yield name
    finally:
        _unregister_process_group(name)  # type: ignore[arg-type]


def gather(group: Group, told: Told) -> list[Told]:
    """Everybody's object, in order of rank.

    They travel as msgpack, since nothing that comes from another process is unpickled here.
    """
    packed = torch.frombuffer(bytearray(msgspec.msgpack.encode(told)), dtype=torch.uint8).to(group.device)
    sizes: list[int] = group.all_gather(torch.tensor([packed.numel()], device=group.device)).tolist()
    everything = group.all_gather_ragged(packed, sizes).cpu()
    parts = torch.split_with_sizes(everything, sizes)
    return [msgspec.msgpack.decode(part.numpy().tobytes()) for part in parts]
