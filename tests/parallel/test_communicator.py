"""What libraries are given in place of mpi4py's communicator, torch's group and their own: it is one of our groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch.distributed import ProcessGroup

from moe_serve.base.errors import ConfigError, EngineError
from moe_serve.parallel import whereabouts
from moe_serve.parallel.communicator import Communicator, MutableCommunicator, ParallelGroup, registered
from moe_serve.parallel.whereabouts import ranks_by_place, refuse_apart
from tests.support.ranks import Ranks, Seat

pytestmark = pytest.mark.ranks
SIZE = 3


@dataclass
class Introduction:
    rank: int
    handle: bytes


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(SIZE) as spawned:
        yield spawned


def objects(seat: Seat) -> list[object]:
    group = seat.group()
    told = [seat.rank, b"handle", "name", None, [b"in a list"] * seat.rank]  # of other sizes on each rank
    return [
        Communicator(group).allgather(told),
        MutableCommunicator(group).allgather(told),
        Communicator(group).bcast(seat.rank, root=1),
        ParallelGroup(group).all_gather_object(Introduction(seat.rank, b"%d" % seat.rank)),
    ]


def test_objects_of_all_ranks_arrive_as_what_they_were(ranks: Ranks) -> None:
    everybody = [[rank, b"handle", "name", None, [b"in a list"] * rank] for rank in range(SIZE)]
    introductions = [Introduction(rank, b"%d" % rank) for rank in range(SIZE)]
    for plain, mutable, sent, introduced in ranks.run(objects):
        assert (plain, sent, introduced) == (everybody, 1, introductions)
        assert mutable == everybody
        assert type(mutable[1][1]) is type(mutable[1][4][0]) is bytearray


def split(seat: Seat) -> list[object]:
    communicator = Communicator(seat.group())
    whole = communicator.Split(0, seat.rank)
    try:
        communicator.Split(seat.rank % 2, seat.rank)
    except EngineError as error:
        return [whole is communicator, str(error)]
    return [whole is communicator, ""]


def test_a_communicator_is_split_whole_or_not_at_all(ranks: Ranks) -> None:
    for whole, said in ranks.run(split):
        assert whole
        assert said == "group 'world' of 3 ranks cannot be split: [[0, 0], [1, 1], [0, 2]]"


def of_a_node(seat: Seat) -> tuple[int, int, list[object]]:
    members = [0] if seat.rank == 0 else [1, 2]
    group = ParallelGroup(seat.group(), members)
    return group.rank, group.size, group.all_gather_object(seat.rank)


def test_members_of_a_group_hear_each_other_alone(ranks: Ranks) -> None:
    assert ranks.run(of_a_node) == [(0, 1, [0]), (0, 2, [1, 2]), (1, 2, [1, 2])]


def by_native_code(seat: Seat) -> list[object]:
    """As a library's C++ does: the group is looked up by its name there."""
    mine = torch.tensor([[seat.rank, to] for to in range(SIZE)], dtype=torch.uint8)
    with registered(seat.group()) as name:
        sent = torch.ops._c10d_functional.all_to_all_single(mine, [1] * SIZE, [1] * SIZE, name)
        came = torch.ops._c10d_functional.wait_tensor(sent).tolist()
        group = torch._C._distributed_c10d._resolve_process_group(name)
        assert isinstance(group, ProcessGroup)
    try:
        torch._C._distributed_c10d._resolve_process_group(name)
    except (RuntimeError, ValueError):
        return [came, group.rank(), group.size(), "gone"]
    return [came, group.rank(), group.size(), "still there"]


def test_native_code_finds_a_group_by_its_name_and_exchanges_rows_over_it(ranks: Ranks) -> None:
    for rank, answer in enumerate(ranks.run(by_native_code)):
        assert answer == [[[source, rank] for source in range(SIZE)], rank, SIZE, "gone"]


def places(seat: Seat) -> list[object]:
    group = seat.group()
    together = ranks_by_place(group, "net", "pid")
    refuse_apart(group, "a wire", ("net",), "a network")
    if seat.rank == 1:
        whereabouts.place_identity, real = (lambda *_: bytes(32)), whereabouts.place_identity  # type: ignore[assignment]
    try:
        apart = ranks_by_place(group)
        refuse_apart(group, "a wire", ("net",), "a network")
    except ConfigError as error:
        return [together, apart, str(error)]
    finally:
        if seat.rank == 1:
            whereabouts.place_identity = real
    return [together, apart, ""]


def test_ranks_in_different_places_are_named(ranks: Ranks) -> None:
    said = "a wire: rank 1 and rank 0 are on different machines, or in containers with a network of their own"
    assert ranks.run(places) == [[[[0, 1, 2]], [[0, 2], [1]], said]] * SIZE
