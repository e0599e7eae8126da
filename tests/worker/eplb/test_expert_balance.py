"""Experts with copies on real ranks: every (token, expert) pair is computed exactly once, whatever is where."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_serve.base.commands import SetShares, StageExperts, StepPlan
from moe_serve.base.model_config import RouterConfig
from moe_serve.base.tables import ALL2ALL
from moe_serve.base.topology import Topology, split_range
from moe_serve.eplb.placement import Placement
from moe_serve.eplb.shares import without_gaps
from moe_serve.model.all2all.base import Arrived
from moe_serve.model.all2all.limits import backends_for
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout
from moe_serve.model.context import ForwardContext
from moe_serve.model.moe.expert_map import ExpertMap, even_copies
from moe_serve.model.moe.experts import Experts
from moe_serve.model.moe.layer import MoELayer
from moe_serve.model.moe.router import Router
from moe_serve.worker.eplb.expert_balance import ExpertBalance
from tests.support.arrived import counts_of
from tests.support.oracle import random_experts
from tests.support.ranks import Ranks, Seat

pytestmark = pytest.mark.ranks
CPU = torch.device("cpu")
RANKS, LAYERS, E, D, F, K = 4, 2, 6, 8, 4, 2
ROUTER = RouterConfig(top_k=K, norm_topk_prob=True)
SHIFT = 1 << 20
"""Row hashes of different ranks are this far apart."""


@dataclass(frozen=True)
class Scene:
    """Everything that the ranks must agree on, from one seed."""

    seed: int
    backend: str
    tp: int = 1

    def offsets(self) -> tuple[int, ...]:
        """Ragged: 6 to 11 slots on four ranks, each of which may have none."""
        chance = np.random.default_rng(self.seed)
        slots = int(chance.integers(E, 2 * E))
        return (0, *sorted(chance.integers(0, slots + 1, RANKS - 1).tolist()), slots)

    def placement(self, number: int) -> Placement:
        """Any valid one: copies may meet on a rank."""
        chance = np.random.default_rng((self.seed, number))
        offsets = self.offsets()
        more = chance.integers(0, E, (LAYERS, offsets[-1] - E))
        table = chance.permuted(np.concatenate([np.tile(np.arange(E), (LAYERS, 1)), more], axis=1), axis=1)
        return Placement(table.astype(np.int64), offsets, E)

    def shares(self, number: int, placement: Placement, layers: Sequence[int]) -> dict[int, bytes]:
        """Any cumulative shares for each rank, each a node of its own; some of them zero."""
        chance = np.random.default_rng((self.seed, number, 7))
        copies = int(placement.copies().max())
        tables = {}
        for rank in range(RANKS):
            raw = chance.random((LAYERS, E, copies)) * chance.integers(0, 2, (LAYERS, E, copies))
            raw[placement.logical_to_physical() < 0] = 0
            raw[:, :, 0] += 1e-3
            cumulative = np.cumsum(raw, axis=2)
            table = (cumulative / cumulative[:, :, -1:]).astype(np.float32)
            of_layers = placement.of_layers(layers)
            tables[rank] = without_gaps(table[list(layers), :, : of_layers.copies().max()], of_layers).tobytes()
        return tables

    def rows(self, step: int) -> list[int]:
        """Tokens of each engine; some have none."""
        return [int(count) for count in np.random.default_rng((self.seed, step, 3)).integers(0, 5, RANKS // self.tp)]

    def x(self, step: int, engine: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100 + step * 10 + engine)
        return torch.randn((self.rows(step)[engine], D), generator=generator)


class Counting(Experts):
    """Experts that remember how many rows each of them got."""

    counts: Tensor

    def forward(self, arrived: Arrived) -> Tensor:
        self.counts = counts_of(arrived, self.gate_up.shape[0]).clone()
        return super().forward(arrived)


class Part:
    """One rank's layers and their balance."""

    def __init__(self, seat: Seat, scene: Scene) -> None:
        self.seat, self.scene = seat, scene
        self.topology = Topology(dp=RANKS // scene.tp, tp=scene.tp)
        self.groups = seat.groups(self.topology)
        placement = scene.placement(0)
        layout = ExpertLayout(placement.num_physical, placement.offsets)
        shape = DispatchShape(max_rows=4, num_ranks=RANKS, hidden=D, top_k=ROUTER.top_k, dtype="float32")
        backend = ALL2ALL.load(scene.backend)(self.groups.ep, layout, shape)  # type: ignore[operator]
        self.layers = [self._layer(layer, placement, backend) for layer in range(LAYERS)]
        migration = seat.groups(Topology(dp=1, tp=RANKS)).tp if scene.tp == 1 else seat.groups(Topology(dp=RANKS)).dp
        self.balance = ExpertBalance(
            dict(enumerate(self.layers)), placement, self.groups.ep, migration, max_bytes_per_step=300
        )
        self.steps = 0
        self.uncollected = 1

    def step(self, *, commit: int = 0, drop: int = -1, collect: bool = False) -> tuple[list[list[int]], bytes]:
        """A step through all layers, each compared with the oracle; rows by layer and slot, and the collected load."""
        scene, self.steps = self.scene, self.steps + 1
        plan = StepPlan(
            step=self.steps,
            scheduled=[],
            tokens_by_dp_rank=scene.rows(self.steps),
            commit_epoch=commit,
            drop_after_pieces=drop,
            collect_load=collect,
        )
        self.balance.before_step(plan)
        engine, _, tp_rank = self.topology.coordinates(self.seat.rank)
        x_TD = scene.x(self.steps, engine)
        hash_T = torch.arange(len(x_TD)) + engine * SHIFT + self.steps * 1000
        rows = [len(split_range(count, scene.tp, tp)) for count in scene.rows(self.steps) for tp in range(scene.tp)]
        ctx = ForwardContext(torch.empty(0), None, (), tuple(rows), row_hash_T=hash_T, routes=[])
        counts = []
        for number, layer in enumerate(self.layers):
            out_TD = layer(x_TD, ctx)
            expected = random_experts(E, D, F, seed=number)(x_TD, *layer.router(x_TD))
            torch.testing.assert_close(out_TD.double(), expected, atol=1e-5, rtol=1e-5)
            assert isinstance(layer.experts, Counting)
            counts.append(layer.experts.counts.tolist())
        part = split_range(len(x_TD), scene.tp, tp_rank)
        assert ctx.routes is not None
        decode_S = (torch.arange(len(x_TD)) % 2)[part.start : part.stop]
        assert ctx.clock.expert_seconds > 0, "also of a rank without rows: it was asked"
        collected = self.balance.after_step(plan, ctx.routes, decode_S, expert_seconds=0.25 * (1 + self.seat.rank))
        if collected.load:
            assert collected.expert_seconds == [0.25 * (1 + rank) * self.uncollected for rank in range(RANKS)]
        self.uncollected = 1 if collect else self.uncollected + 1
        return counts, collected.load

    def stage(self, epoch: int) -> None:
        """Take a stage of the scene's next placement up."""
        self.balance.stage(stage_of(self.scene, epoch))

    def poll(self, *, until: str) -> None:
        """Poll until the stage is "staged" or "gone"."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            status = self.balance.poll()
            if status.staged if until == "staged" else not status.epoch:
                return
            time.sleep(0.0005)
        raise AssertionError(f"not {until}: {self.balance.status()}")

    def _layer(self, layer: int, placement: Placement, backend: object) -> MoELayer:
        router = Router(D, E, ROUTER, device=CPU)
        router.weight.copy_(torch.randn((E, D), generator=torch.Generator().manual_seed(layer)))
        dense, held = random_experts(E, D, F, seed=layer), placement.logical_of(layer, self.seat.rank)
        experts = Counting(len(held), D, F, torch.float32, CPU)
        experts.gate_up.copy_(dense.gate_up[held])
        experts.down.copy_(dense.down[held])
        copies = even_copies(placement.physical_to_logical_LP[layer].tolist(), E)
        expert_map = ExpertMap(*copies, salt=1 + layer * RANKS + self.seat.rank)
        return MoELayer(router, expert_map, experts, backend, self.groups.tp, None)  # type: ignore[arg-type]


def stage_of(scene: Scene, epoch: int) -> StageExperts:
    """Layer 0 in odd epochs, all layers in even ones; layers that are not staged keep what they have."""
    layers = [0] if epoch % 2 else list(range(LAYERS))
    placement = scene.placement(epoch)
    rows = {layer: placement.physical_to_logical_LP[layer].tolist() for layer in layers}
    return StageExperts(epoch=epoch, rows=rows, shares=scene.shares(epoch, placement, layers), node_sizes=(1,) * RANKS)


Counts = list[list[list[int]]]


def through_rearrangements(seat: Seat, scene: Scene) -> tuple[Counts, list[bytes]]:
    """Steps before, during and after two rearrangements, with other shares in between; all compared with the oracle."""
    with torch.inference_mode():
        part = Part(seat, scene)
        done = [part.step()]
        for epoch in (1, 2):
            part.stage(epoch)
            done.append(part.step())
            part.poll(until="staged")
            done.append(part.step(commit=epoch))
            served = current(scene, epoch)
            part.balance.set_shares(
                SetShares(epoch=epoch, shares=scene.shares(50, served, range(LAYERS)), node_sizes=(1,) * RANKS)
            )
            done.append(part.step(collect=True))
    return [counts for counts, _ in done], [load for _, load in done]


def current(scene: Scene, epoch: int) -> Placement:
    """What is served after an epoch's commit (see stage_of)."""
    table = scene.placement(0).physical_to_logical_LP.copy()
    for each in range(1, epoch + 1):
        for layer, row in stage_of(scene, each).rows.items():
            table[layer] = row
    return Placement(table, scene.offsets(), E)


def served_at(scene: Scene, step: int) -> Placement:
    """Steps 1 and 2 have the first placement, 3 to 5 the second, 6 and 7 the third."""
    return current(scene, step // 3)


def chosen(scene: Scene, step: int) -> Tensor:
    """int64 (L, 2, E): which experts the tokens of all engines want, by the routers alone."""
    counts = torch.zeros((LAYERS, 2, E), dtype=torch.int64)
    for layer in range(LAYERS):
        router = Router(D, E, ROUTER, device=CPU)
        with torch.inference_mode():
            router.weight.copy_(torch.randn((E, D), generator=torch.Generator().manual_seed(layer)))
            for engine in range(RANKS // scene.tp):
                ids_TK, _ = router(scene.x(step, engine))
                for row, ids in enumerate(ids_TK.tolist()):
                    counts[layer, row % 2, ids] += 1
    return counts


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("backend", backends_for("cpu"))
def test_every_pair_is_computed_exactly_once_under_any_placement_and_shares(
    ranks: Ranks, backend: str, tp: int
) -> None:
    @settings(max_examples=3, deadline=None)
    @given(st.integers(0, 10_000))
    def check(seed: int) -> None:
        scene = Scene(seed, backend, tp)
        answers = ranks.run(through_rearrangements, scene)
        for index in range(7):
            step, wanted = index + 1, chosen(scene, index + 1).sum(dim=1)
            row_LP = served_at(scene, step).physical_to_logical_LP
            for layer in range(LAYERS):
                by_slot = [count for counts, _ in answers for count in counts[index][layer]]
                computed = np.bincount(row_LP[layer], weights=by_slot, minlength=E)
                assert computed.tolist() == wanted[layer].tolist(), (step, layer)

    check()


def test_the_load_of_all_ranks_is_collected_by_rank_0_alone(ranks: Ranks) -> None:
    for tp in (1, 2):
        scene = Scene(5, "torch_a2a", tp)
        answers = ranks.run(through_rearrangements, scene)
        loads = [[load for load in loads if load] for _, loads in answers]
        assert [len(found) for found in loads] == [2, 0, 0, 0]
        for load, steps in zip(loads[0], (range(1, 5), range(5, 8)), strict=True):
            counts = torch.from_numpy(np.frombuffer(load, dtype=np.int64).reshape(LAYERS, 2, E).copy())
            assert torch.equal(counts, torch.stack([chosen(scene, step) for step in steps]).sum(dim=0))


def drop_one(seat: Seat, scene: Scene) -> tuple[bool, int]:
    """A stage is dropped half-way; afterwards maps and weights are as before, and the next stage is committed."""
    with torch.inference_mode():
        part = Part(seat, scene)
        before = [layer.expert_map.slots_EC.clone() for layer in part.layers]  # type: ignore[union-attr]
        part.stage(2)
        if seat.rank != 1:
            for _ in range(3):
                part.balance.poll()
        status = part.balance.status()
        assert status is not None
        posted = part.groups.ep.all_gather(torch.tensor([status.pieces_posted]))
        part.step(drop=int(posted.max()))
        part.poll(until="gone")
        same = all(
            torch.equal(layer.expert_map.slots_EC, slots)  # type: ignore[arg-type]
            for layer, slots in zip(part.layers, before, strict=True)
        )
        part.step()
        part.stage(4)
        part.poll(until="staged")
        part.step(commit=4)
        part.step()
    return same, int(posted.max())


def test_a_dropped_stage_leaves_maps_and_weights_and_the_next_one_works(ranks: Ranks) -> None:
    answers = ranks.run(drop_one, Scene(11, "allgather_reducescatter"))
    assert all(same for same, _ in answers)
    assert answers[0][1] > 0, "something had been posted"


def late_shares(seat: Seat, scene: Scene) -> tuple[bool, bool, bool]:
    """Shares for an epoch that is over, that is to come, and for the one that is served: which of them count."""
    with torch.inference_mode():
        part = Part(seat, scene)
        part.stage(2)
        part.poll(until="staged")
        part.step(commit=2)
        served = current(scene, 2)
        changed = []
        for epoch in (0, 3, 2):
            before = [layer.expert_map.shares_EC.clone() for layer in part.layers]  # type: ignore[union-attr]
            part.balance.set_shares(
                SetShares(epoch=epoch, shares=scene.shares(60, served, range(LAYERS)), node_sizes=(1,) * RANKS)
            )
            pairs = zip(part.layers, before, strict=True)
            changed.append(any(not torch.equal(layer.expert_map.shares_EC, old) for layer, old in pairs))  # type: ignore[arg-type]
    return changed[0], changed[1], changed[2]


def test_shares_count_only_for_the_epoch_that_is_served(ranks: Ranks) -> None:
    assert ranks.run(late_shares, Scene(3, "naive")) == [(False, False, True)] * RANKS
