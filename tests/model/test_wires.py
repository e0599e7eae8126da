"""Backends of libraries that need GPUs, over doubles of these: the cases of every backend, and refusals.

What a backend declares that it cannot carry is listed here by name, with the sentence that refuses it.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from moe_kernels.quantise.quantise import dequantise, quantise
from torch import Tensor

from moe_serve.base.errors import ConfigError, MoEServeError
from moe_serve.base.tables import ALL2ALL
from moe_serve.model.all2all.limits import LIMITS, check_dispatch
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout
from moe_serve.model.moe.experts import Experts
from moe_serve.parallel import whereabouts
from tests.support.doubles import LIBRARIES, stand_in
from tests.support.exchanges import CASES, Case, compare, exchange, exchanges
from tests.support.oracle import random_experts
from tests.support.ranks import Ranks, Seat

pytestmark = pytest.mark.ranks
NOT_CARRIED = {"experts cut by width", "experts cut by width, some missing"}
"""By all of them: they move rows to whole experts."""
CARRIED = [replace(case, num_experts=12) for case in CASES if case.name not in NOT_CARRIED]
"""Twelve, since all of them need as many experts on every rank."""


def through_double(seat: Seat, size: int, backend: str) -> list[Tensor]:
    stand_in(LIBRARIES[backend], is_open=True)
    return exchanges(seat, size, backend, CARRIED)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_leaf_gives_what_a_dense_computation_gives(ranks: Ranks, backend: str, size: int) -> None:
    compare(ranks.run(through_double, size, backend, only=size), CARRIED)


@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize("case", [case for case in CASES if case.name in NOT_CARRIED], ids=lambda case: case.name)
def test_what_a_leaf_cannot_carry_is_refused_by_a_sentence(backend: str, case: Case) -> None:
    shape = DispatchShape(max_rows=64, num_ranks=8, hidden=4096, top_k=8, dtype="bfloat16", device="cuda")
    check_dispatch(backend, shape, ExpertLayout(64, tuple(range(0, 65, 8))))
    with pytest.raises(ConfigError, match="add --enable-expert-parallel"):
        check_dispatch(backend, shape, ExpertLayout(64, None))


def test_all_libraries_have_a_double() -> None:
    assert set(LIBRARIES) == {name for name in ALL2ALL if LIMITS[name].devices == ("cuda",)}


def on_two_machines(seat: Seat, backend: str) -> str:
    stand_in(LIBRARIES[backend], is_open=True)
    told: list[logging.LogRecord] = []
    logger = logging.getLogger("moe_serve.model.all2all.pplx_garden")
    logger.addFilter(lambda record: bool(told.append(record)))
    real = whereabouts.place_identity
    if seat.rank == 0:
        whereabouts.place_identity = lambda *_: bytes(32)
    try:
        compare([[exchange(seat, 3, backend, CARRIED[1])]] if seat.rank == 0 else [], [CARRIED[1]])
        if seat.rank:
            exchange(seat, 3, backend, CARRIED[1])
    except ConfigError as error:
        return str(error)
    finally:
        whereabouts.place_identity = real
        logger.filters.clear()
    return " ".join(record.getMessage() for record in told)


def test_ranks_of_several_machines_are_refused_or_warned_of_before_anything_is_sent(ranks: Ranks) -> None:
    refused = set(ranks.run(on_two_machines, "pplx", only=3))
    assert refused == {
        "--all2all-backend pplx stays within a machine: ranks 1, 2 and rank 0 are on different machines, or in "
        "containers with processes or IPC of their own"
    }
    warned, *others = ranks.run(on_two_machines, "pplx_garden", only=3)
    assert "wants 1 or 2 or 4 or 8 ranks, one behind the other, on every machine, and there are 0; 1, 2" in warned
    assert others == ["", ""]


REAL_HIDDEN, REAL_WIDTH, REAL_TOP_K, REAL_EXPERTS = 2048, 64, 8, 16
REAL_ROWS = (5, 16)
BOUND = 2e-2
"""Of what bfloat16 rounds: rows' terms once, their sums once."""
QUANTISED_BOUND = 6e-2
"""Of rows of which each element may be wrong by a sixteenth, independently."""
WIRES = ("auto", "fp8")


def real_batch(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    rows = REAL_ROWS[rank]
    x_TD = torch.randn((rows, REAL_HIDDEN), generator=generator).bfloat16()
    ids_TK = torch.rand((rows, REAL_EXPERTS), generator=generator).argsort(dim=1)[:, :REAL_TOP_K].contiguous()
    return x_TD, ids_TK, torch.rand((rows, REAL_TOP_K), generator=generator)


def with_real_limits(seat: Seat, backend: str, wire: str) -> Tensor:
    stand_in(LIBRARIES[backend], is_open=False)
    layout = ExpertLayout(REAL_EXPERTS, (0, REAL_EXPERTS // 2, REAL_EXPERTS))
    shape = DispatchShape(
        max_rows=17,
        num_ranks=2,
        hidden=REAL_HIDDEN,
        top_k=REAL_TOP_K,
        dtype="bfloat16",
        quantisation=None if wire == "auto" else wire,
        device="cuda",
    )
    check_dispatch(backend, shape, layout)
    dense = random_experts(REAL_EXPERTS, REAL_HIDDEN, REAL_WIDTH, seed=1)
    own = slice(layout.first_slot(seat.rank), layout.first_slot(seat.rank) + REAL_EXPERTS // 2)
    experts = Experts(REAL_EXPERTS // 2, REAL_HIDDEN, REAL_WIDTH, torch.bfloat16, torch.device("cpu"))
    experts.gate_up.copy_(dense.gate_up[own])
    experts.down.copy_(dense.down[own])
    all2all = ALL2ALL.load(backend)(seat.group(2), layout, shape)  # type: ignore[operator]
    x_TD, ids_TK, weights_TK = real_batch(seat.rank)
    found = []
    for _ in range(3):
        arrived = all2all.dispatch(x_TD, ids_TK.to(all2all.id_dtype), weights_TK, REAL_ROWS).wait()
        assert arrived.rows.dtype == (torch.bfloat16 if wire == "auto" else torch.float8_e4m3fn)
        found.append(all2all.combine(experts(arrived), arrived).wait().clone())
    all2all.close()
    all2all.close()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    return found[0]


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("backend", LIBRARIES)
def test_within_the_real_limits_a_leaf_is_as_close_as_its_types(ranks: Ranks, backend: str, wire: str) -> None:
    dense = random_experts(REAL_EXPERTS, REAL_HIDDEN, REAL_WIDTH, seed=1)
    for rank, out_TD in enumerate(ranks.run(with_real_limits, backend, wire, only=2)):
        x_TD, ids_TK, weights_TK = real_batch(rank)
        sent_TD = x_TD if wire == "auto" else dequantise(*quantise(x_TD), torch.float64)
        expected, exact = dense(sent_TD, ids_TK, weights_TK), dense(x_TD, ids_TK, weights_TK)
        assert (out_TD.double() - expected).abs().max() <= BOUND * expected.abs().max()
        assert (out_TD.double() - exact).abs().max() <= QUANTISED_BOUND * exact.abs().max()


@pytest.mark.parametrize(("library", "backend"), {library: backend for backend, library in LIBRARIES.items()}.items())
def test_a_library_that_is_not_there_is_named_with_where_it_comes_from(library: str, backend: str) -> None:
    if find_spec(library) is not None:
        pytest.skip(f"{library} is installed")
    code = f"from moe_serve.base.tables import ALL2ALL; ALL2ALL.load({backend!r})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stderr
    assert f"MissingExtra: all2all backend {backend!r} needs the Python package {library!r}, which is not" in said
    assert re.search(r"; (build it from https://|install moe-serve\[)", said)


def recorded(library: str) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((Path(__file__).parent / "wires" / f"{library}.json").read_text()))


def parameters(function: Callable[..., object]) -> list[list[str | None]]:
    """As scripts/record_signatures.py writes them."""
    told = inspect.signature(function).parameters.values()
    defaults = {each.name: None if each.default is each.empty else repr(each.default) for each in told}
    return [[name, default] for name, default in defaults.items() if name not in ("self", "cls")]


def signatures_of(library: str) -> tuple[str, list[str]]:
    """Where what is importable under this name parts from what was recorded, and the file it comes from."""
    wrong = []
    for module, parts in recorded(library)["modules"].items():
        for part, functions in parts.items():
            holder = getattr(import_module(module), part)
            for name, told in functions.items():
                found = holder if name == "__call__" else getattr(holder, name, None)
                if found is not None and parameters(found) != told:
                    wrong.append(f"{part}.{name}: {parameters(found)} instead of {told}")
    return str(import_module(library).__file__), wrong


def of_double(seat: Seat, library: str) -> tuple[str, list[str]]:
    stand_in(library, is_open=False)
    return signatures_of(library)


@pytest.mark.parametrize("library", sorted(set(LIBRARIES.values())))
def test_a_double_has_the_recorded_signatures(ranks: Ranks, library: str) -> None:
    ((file, wrong),) = ranks.run(of_double, library, only=1)
    assert "doubles" in file
    assert not wrong
    assert recorded(library)["version"]
    assert len(recorded(library)["commit"]) == 40


@pytest.mark.parametrize("library", sorted(set(LIBRARIES.values())))
def test_an_installed_library_has_the_recorded_signatures(library: str) -> None:
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    assert not signatures_of(library)[1]


USED = {
    "deepep_high_throughput": ("deep_ep:Buffer",),
    "deepep_low_latency": ("deep_ep:Buffer",),
    "deepep_v2": ("deep_ep:ElasticBuffer",),
    "pplx": ("pplx_kernels:AllToAll",),
    "pplx_garden": ("pplx_garden.kernels.p2p_all_to_all:P2PAllToAll",),
    **{
        f"flashinfer_nvlink_{kind}": tuple(
            f"flashinfer.moe_ep:{name}"
            for name in (each, f"{each.removesuffix('AlltoAll')}Config", "MoEEpCommParams", "BootstrapConfig")
        )
        for kind, each in (("one_sided", "NVLinkOneSidedAlltoAll"), ("two_sided", "NVLinkTwoSidedAlltoAll"))
    },
}
"""Of each backend the classes whose functions it calls."""


def mutants(seat: Seat, backend: str) -> list[str]:
    """Every argument that the leaf gives to its library left out, or of another type or size: which nobody notices."""
    stand_in(LIBRARIES[backend], is_open=True)
    used = [getattr(import_module(path.split(":")[0]), path.split(":")[1]) for path in USED[backend]]
    case = CARRIED[1]
    given: dict[tuple[type, str, str], object] = {}
    defaults: dict[tuple[type, str, str], object] = {}

    def remember(kind: type, name: str, told: dict[str, object], signature: inspect.Signature) -> None:
        for key, value in told.items():
            given[kind, name, key] = value
            defaults[kind, name, key] = signature.parameters[key].default

    with calls_changed(used, remember):
        exchange(seat, 1, backend, case)
    unnoticed = []
    for (kind, name, key), value in given.items():
        for what, other in changes(value, defaults[kind, name, key]):
            with calls_changed(used, partial(change, (kind, name, key), other)):
                try:
                    compare([[exchange(seat, 1, backend, case)]], [case])
                except NOTICED:
                    continue
            unnoticed.append(f"{name}({key}) {what}")
    return [f"{len(given)} arguments", *unnoticed]


LEFT_OUT = object()
NOTICED = (AssertionError, MoEServeError, AttributeError, TypeError, RuntimeError, ValueError, ArithmeticError)
HARMLESS = {
    "__init__(num_topk) left out",  # DeepEP then makes room for rows that go everywhere
    "dispatch(topk_ids) of another type",  # FlashInfer then makes another of them
    "dispatch(max_tokens_per_rank) left out",  # FlashInfer then takes the most there may be
    "__init__(device) left out",  # of one rank alone, on a CPU
    "__init__(auto_bootstrap) left out",  # concerns what is not used of FlashInfer
}


def changes(value: object, default: object) -> Iterator[tuple[str, object]]:
    """What may go wrong with an argument; nothing, where it is what it would be anyway."""
    if not isinstance(value, Tensor) and value == default:
        return
    yield "left out", LEFT_OUT
    if isinstance(value, Tensor):
        yield "of another type", value.to(torch.int32 if value.dtype != torch.int32 else torch.int64)
        yield "of another size", value[..., :-1]
    elif isinstance(value, int) and not isinstance(value, bool) and value:
        yield "too small", value // 3


def change(
    which: tuple[type, str, str],
    other: object,
    kind: type,
    name: str,
    told: dict[str, object],
    signature: inspect.Signature,
) -> None:
    key = which[2]
    if (kind, name, key) != which or key not in told:
        return
    if other is LEFT_OUT:
        del told[key]
    else:
        told[key] = other


Sees = Callable[[type, str, dict[str, object], inspect.Signature], None]


@contextmanager
def calls_changed(used: Sequence[type], see: Sees) -> Iterator[None]:
    """While this lasts `see` is given the arguments of each call of these classes by name, and may change them."""
    with ExitStack() as stack:
        for kind in used:
            stack.enter_context(class_changed(kind, see))
        yield


@contextmanager
def class_changed(kind: type, see: Sees) -> Iterator[None]:
    names = {"__init__", *(name for base in kind.__mro__[:-1] for name in vars(base) if not name.startswith("_"))}
    before = {name: inspect.getattr_static(kind, name) for name in names}
    own = set(vars(kind))

    def watched(name: str, function: Callable[..., object]) -> Callable[..., object]:
        signature = inspect.signature(function)

        def call(first: object, *args: object, **kwargs: object) -> object:
            told = dict(signature.bind(first, *args, **kwargs).arguments)
            del told[next(iter(signature.parameters))]
            see(kind, name, told, signature)
            return function(first, **told)

        return call

    try:
        for name, function in before.items():
            if isinstance(function, classmethod):
                setattr(kind, name, classmethod(watched(name, function.__func__)))
            elif inspect.isfunction(function):
                setattr(kind, name, watched(name, function))
        yield
    finally:
        for name, function in before.items():
            if name in own:
                setattr(kind, name, function)
            elif name in vars(kind):
                delattr(kind, name)


@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_wrong_call_of_the_library_is_noticed(ranks: Ranks, backend: str) -> None:
    ((count, *unnoticed),) = ranks.run(mutants, backend, only=1)
    assert int(count.split()[0]) >= 10
    assert set(unnoticed) <= HARMLESS
