"""All-to-all in shared memory beyond the conformance suite: what does not fit, what is taken instead, many in a row."""

from __future__ import annotations

import logging
import resource

import pytest
import torch
from moe_kernels.paths import available
from torch import Tensor

from moe_serve.base.errors import ConfigError
from moe_serve.model.all2all.base import All2All, RankMajor
from moe_serve.model.all2all.limits import check_dispatch
from moe_serve.model.all2all.rows import add_to_rows, sort_rows
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout
from moe_serve.model.all2all.shared_memory import SharedMemoryAllToAll
from moe_serve.model.build import make_all2all
from moe_serve.parallel import whereabouts
from moe_serve.parallel.collectives import alone
from tests.support.arrived import compute
from tests.support.exchanges import Case, D, E, K, batch, placement_of, slots_of
from tests.support.ranks import Ranks, Seat

pytestmark = pytest.mark.ranks
SIZE = 3
LAYOUT = ExpertLayout(E, (0, 4, 7, 10))
EXCHANGES = 40
SMALL_BYTES = 1250
"""For each byte of a number: room for some of the exchanges below and not for others."""


def shape_of(dtype: str = "float32") -> DispatchShape:
    """In bfloat16 with a compiled sum, where there is one."""
    path = available()[-1] if dtype == "bfloat16" and available() else None
    return DispatchShape(max_rows=9, num_ranks=SIZE, hidden=D, top_k=K, dtype=dtype, path=path)


def shape_bytes(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)


def rows_of(number: int) -> tuple[int, ...]:
    """Of each rank in one of many exchanges, none at all among them."""
    return tuple((number * (rank + 2) + rank) % 8 * (number % 7 != 3) for rank in range(SIZE))


def one_way(backend: All2All, case: Case, rank: int) -> Tensor:
    """Out and home, with experts that are not linear and tell rows apart by their expert."""
    x_TD, ids_TK, weights_TK = batch(case, rank)
    slots_TK = ids_TK if case.strategy is None else slots_of(placement_of(case, SIZE), ids_TK)
    arrived = backend.dispatch(x_TD, slots_TK.to(backend.id_dtype), weights_TK, case.rows_by_rank).wait()
    first = 0 if case.strategy is None else LAYOUT.first_slot(rank)
    part = 1 if case.strategy is not None else (rank + 1) / 7

    def expert(rows: Tensor, numbers: Tensor) -> Tensor:
        return torch.sin(rows * part + numbers + first).to(rows.dtype)

    if isinstance(arrived, RankMajor):
        rows, pairs, counts_e = sort_rows(arrived.rows, arrived.ids_RK, 0, E)
        terms = expert(rows, torch.repeat_interleave(torch.arange(E), counts_e)[:, None])
        outputs = add_to_rows(
            terms, pairs, arrived.weights_RK, rows.dtype, shape_of(str(rows.dtype).removeprefix("torch.")).path
        )
    else:
        outputs = compute(arrived, E if case.strategy is None else LAYOUT.num_local(rank), expert)
    return backend.combine(outputs, arrived).wait()


def beside_the_network(seat: Seat, cut: bool, dtype: str) -> tuple[int, int]:
    """Many exchanges in a row, in a small memory and in one that holds all, against the backend of the same bits."""
    group, layout = seat.group(SIZE), ExpertLayout(E, None) if cut else LAYOUT
    shape = shape_of(dtype)
    small = SharedMemoryAllToAll(group, layout, shape, most_bytes=SMALL_BYTES * shape_bytes(dtype))
    large = SharedMemoryAllToAll(group, layout, shape)
    other = make_all2all("allgather_reducescatter" if cut else "torch_a2a", group, layout, shape)
    for number in range(EXCHANGES):
        ids = "some missing" if number % 3 == 0 else "random"
        case = Case("one of many", rows_of(number), None if cut else "linear", ids, getattr(torch, dtype))
        expected = one_way(other, case, seat.rank)
        assert torch.equal(one_way(small, case, seat.rank), expected), number
        assert torch.equal(one_way(large, case, seat.rank), expected), number
    for backend in (small, large, other):
        backend.close()
    return small.num_spilled, large.num_spilled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cut", [False, True], ids=["whole experts", "experts cut by width"])
def test_what_does_not_fit_takes_the_network_and_the_bits_are_the_same(ranks: Ranks, cut: bool, dtype: str) -> None:
    spilled = ranks.run(beside_the_network, cut, dtype, only=SIZE)
    assert len(set(spilled)) == 1, "ranks must decide alike"
    assert 5 < spilled[0][0] < EXCHANGES - 5
    assert spilled[0][1] == 0


def without_memory(seat: Seat) -> tuple[str, list[str], bool]:
    """The first rank may not make a file of more than a page."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("moe_serve").addHandler(handler)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if seat.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        backend = make_all2all("shm", seat.group(SIZE), LAYOUT, shape_of())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        logging.getLogger("moe_serve").removeHandler(handler)
    case = Case("after a fallback", (2, 0, 5))
    same = torch.allclose(one_way(backend, case, seat.rank), one_way(backend, case, seat.rank))
    return type(backend).__name__, lines, same


def test_where_there_is_no_memory_all_ranks_take_another_backend_and_one_says_so(ranks: Ranks) -> None:
    (first, said, _), *others = ranks.run(without_memory, only=SIZE)
    assert said == [
        "--all2all-backend shm needs memory that ranks 0, 1, 2 share, and rank 0 cannot have it: File too large; "
        "allgather_reducescatter is used instead"
    ]
    assert first == "AllGatherReduceScatter"
    assert others == [(first, [], True)] * 2


def on_different_machines(seat: Seat) -> str:
    if seat.rank == 2:
        whereabouts.place_identity, real = (lambda *_: bytes(32)), whereabouts.place_identity  # type: ignore[assignment]
    try:
        make_all2all("shm", seat.group(SIZE), LAYOUT, shape_of())
    except ConfigError as error:
        return str(error)
    finally:
        if seat.rank == 2:
            whereabouts.place_identity = real
    return ""


def test_ranks_of_several_machines_are_refused_by_name(ranks: Ranks) -> None:
    said = set(ranks.run(on_different_machines, only=SIZE))
    assert said == {
        "--all2all-backend shm: memory cannot be shared: rank 2 and rank 0 are on different machines, or in "
        "containers with a network of their own; choose auto, or a backend that uses the network"
    }


def test_a_gpu_is_refused_before_and_after_a_start() -> None:
    shape = DispatchShape(max_rows=9, num_ranks=2, hidden=D, top_k=K, dtype="float32", device="cuda")
    with pytest.raises(ConfigError, match="is for ranks that compute on cpu, not on cuda; choose another --dev"):
        check_dispatch("shm", shape, LAYOUT)
    with pytest.raises(ConfigError, match="shm is for ranks on CPUs, and this one is on cuda:0"):
        SharedMemoryAllToAll(alone("ep", 0, torch.device("cuda:0")), ExpertLayout(E, (0, E)), shape_of())
