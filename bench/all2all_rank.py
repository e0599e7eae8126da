"""One rank of bench.all2all: real groups over 127.0.0.1, every backend in turns on the same rows, bytes counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from moe_serve.base.tables import ALL2ALL
from moe_serve.base.topology import Topology, split_range
from moe_serve.model.all2all.base import All2All, Placed
from moe_serve.model.all2all.rows import put_rows, sort_rows
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.groups import build_groups
from moe_serve.parallel.shm import share

HOST, TOKEN = "127.0.0.1", "token of a benchmark's world"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is exchanged: `skews` are exponents s, expert i drawn as often as 1 / (i + 1)^s; 0 is even."""

    backends: tuple[str, ...]
    rows: tuple[int, ...]
    skews: tuple[float, ...]
    hidden: int
    top_k: int
    experts: int
    dtype: str
    turns: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Batch:
    """This rank's part of one exchange."""

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    rows_by_rank: tuple[int, ...]


class CountedGroup(Group):
    """Bytes that leave this rank for others through the network's way."""

    bytes_sent = 0

    def _all_to_all(
        self, what: str, out: Tensor, x: Tensor, recv_counts: Sequence[int], send_counts: Sequence[int]
    ) -> Any:
        row = x[:1].numel() * x.element_size()
        self.bytes_sent += row * (sum(send_counts) - send_counts[self.rank])
        return super()._all_to_all(what, out, x, recv_counts, send_counts)

    def start_broadcast(self, x: Tensor, source: int) -> Any:
        self.bytes_sent += x.numel() * x.element_size() * (self.size - 1) * (source == self.rank)
        return super().start_broadcast(x, source)

    def all_reduce(self, x: Tensor) -> Tensor:
        self.bytes_sent += 2 * x.numel() * x.element_size() * (self.size - 1) // self.size  # a ring's
        return super().all_reduce(x)


def run(rank: int, size: int, port: int, sizes: Sizes) -> dict[str, Any]:
    """All cases in the same order on every rank; the answer of rank 0 is the report's."""
    torch.set_num_threads(1)
    where: dict[str, Any] = {"store_host": HOST, "store_port": port, "token": TOKEN, "device": torch.device("cpu")}
    with torch.inference_mode():
        groups = build_groups(Topology(dp=size), rank, timeout_seconds=60, **where)
        group = cast(CountedGroup, groups.ep)
        group.__class__ = CountedGroup
        try:
            return {"cases": _cases(group, sizes), "plain": _plain(group, sizes)}
        finally:
            groups.close()


def _cases(group: CountedGroup, sizes: Sizes) -> list[dict[str, Any]]:
    layout = ExpertLayout(
        sizes.experts, (*(split_range(sizes.experts, group.size, r).start for r in range(group.size)), sizes.experts)
    )
    shape = DispatchShape(
        max_rows=max(sizes.rows), num_ranks=group.size, hidden=sizes.hidden, top_k=sizes.top_k, dtype=sizes.dtype
    )
    num_local = layout.num_local(group.rank)
    backends = {name: cast(type[All2All], ALL2ALL.load(name))(group, layout, shape) for name in sizes.backends}
    found = []
    for rows in sizes.rows:
        for skew in sizes.skews:
            batch = _batch(group, sizes, rows, skew)
            needed, shared = _bytes(batch, layout, group.rank)
            seconds: dict[str, list[float]] = {name: [] for name in backends}
            moved = {}
            for _ in range(sizes.turns):
                for name, backend in backends.items():
                    sent = group.bytes_sent
                    _exchange(backend, batch, num_local)
                    moved[name] = group.bytes_sent - sent
                    if name == "shm" and moved[name] == 0:
                        moved[name] = shared
                    seconds[name].append(_timed(group, sizes.seconds, partial(_exchange, backend, batch, num_local)))
            found.append({"rows": rows, "skew": skew, "needed": needed, "moved": moved, "seconds": seconds})
    for backend in backends.values():
        backend.close()
    return found


def _batch(group: Group, sizes: Sizes, rows: int, skew: float) -> Batch:
    chance = torch.Generator().manual_seed(1000 * rows + group.rank)
    often_E = 1 / torch.arange(1, sizes.experts + 1, dtype=torch.float64) ** skew
    ids_TK = torch.multinomial(often_E.expand(rows, -1), sizes.top_k, generator=chance)
    x_TD = torch.randn((rows, sizes.hidden), generator=chance).to(getattr(torch, sizes.dtype))
    return Batch(x_TD, ids_TK, torch.rand((rows, sizes.top_k), generator=chance), (rows,) * group.size)


def _bytes(batch: Batch, layout: ExpertLayout, rank: int) -> tuple[int, int]:
    """Needed: a row once to each other rank that computes something for it, and one sum back. And what shared memory
    carries: this rank's rows and slots once, and each term that another rank computed for it."""
    assert layout.offsets is not None
    row = batch.x_TD[:1].numel() * batch.x_TD.element_size()
    owner_TK = torch.searchsorted(torch.tensor(layout.offsets[1:]), batch.ids_TK, right=True)
    away_TK = owner_TK != rank
    others = [(owner_TK == other).any(dim=1).sum() for other in range(len(layout.offsets) - 1) if other != rank]
    needed = 2 * row * int(sum(others))
    return needed, len(batch.x_TD) * (row + 4 * batch.ids_TK.shape[1]) + row * int(away_TK.sum())


def _exchange(backend: All2All, batch: Batch, num_local: int) -> Tensor:
    """Out and home, with experts that give back what they get."""
    ids = batch.ids_TK.to(backend.id_dtype)
    arrived = backend.dispatch(batch.x_TD, ids, batch.weights_TK, batch.rows_by_rank).wait()
    if not isinstance(arrived, Placed):
        return backend.combine(arrived.rows, arrived).wait()
    rows, pairs, _ = sort_rows(arrived.rows, arrived.slots, arrived.first_slot, num_local)
    put_rows(arrived.terms.flatten(0, 1), pairs, rows)
    return backend.combine(arrived.terms, arrived).wait()


def _timed(group: Group, seconds: float, once: Callable[[], object]) -> float:
    """Mean of as many as fill the time, the same number on all ranks."""
    started = time.perf_counter()
    once()
    count = group.all_reduce_min(torch.tensor([int(seconds / (time.perf_counter() - started)) + 1]))
    started = time.perf_counter()
    for _ in range(int(count)):
        once()
    return (time.perf_counter() - started) / int(count)


def _plain(group: CountedGroup, sizes: Sizes) -> dict[str, dict[str, list[float]]]:
    """Without a backend around: rows to every other rank, and a few integers of every rank to all (a vote)."""
    x = torch.randn((32 * group.size, sizes.hidden)).to(getattr(torch, sizes.dtype))
    vote, counts = torch.zeros((group.size, 8), dtype=torch.int64), [32] * group.size
    data_bytes = x.numel() * x.element_size()
    memory = share(group, 2 * group.size * data_bytes)
    boxes = memory.data[: 2 * group.size * data_bytes].view(x.dtype).view(2, group.size, group.size, 32, sizes.hidden)
    votes = memory.data[: 128 * group.size].view(torch.int64).view(2, group.size, 8)
    parts, others = x.view(group.size, 32, sizes.hidden), [r for r in range(group.size) if r != group.rank]
    out, number = torch.empty_like(parts), 0

    def rows_in_memory() -> None:
        nonlocal number
        number += 1
        box = boxes[number % 2]
        for other in others:
            box[group.rank, other].copy_(parts[other])
        memory.publish(number)
        memory.wait(number, "rows")
        for other in others:
            out[other].copy_(box[other, group.rank])

    def vote_in_memory() -> list[list[int]]:
        nonlocal number
        number += 1
        votes[number % 2, group.rank] = vote[0]
        memory.publish(number)
        memory.wait(number, "vote")
        return cast(list[list[int]], votes[number % 2].tolist())

    ways: dict[str, dict[str, Callable[[], object]]] = {
        "32 rows to each": {
            "gloo": lambda: group.all_to_all_ragged(x, counts, counts),
            "shared memory": rows_in_memory,
        },
        "vote of 64 bytes": {"gloo": lambda: group.exchange_rows(vote).tolist(), "shared memory": vote_in_memory},
    }
    found: dict[str, dict[str, list[float]]] = {what: {way: [] for way in each} for what, each in ways.items()}
    for _ in range(sizes.turns):
        for what, each in ways.items():
            for way, once in each.items():
                found[what][way].append(_timed(group, sizes.seconds, once))
    memory.close()
    return found
