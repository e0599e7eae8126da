"""Rearrangements in a simulation: real Rebalancer, votes, Rearranging, ExpertBalance and Migrator; fake lines and time.

Ranks live in one process. Messages take any time (and any order, if asked), exchanges of weights finish when all ranks
have posted them, at any time after that.
"""

from __future__ import annotations

import random
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_serve.base.balance_messages import DropStage, Record, StageReport, StepLoad
from moe_serve.base.commands import Command, Done, PollStage, Reply, SetShares, StageExperts, StepPlan, StepResult
from moe_serve.base.eplb_config import EPLBConfig
from moe_serve.base.topology import Topology
from moe_serve.engine.lockstep import Naps, Vote, decide
from moe_serve.engine.rearranging import News, Rearranging
from moe_serve.eplb.placement import Placement, initial_placement
from moe_serve.eplb.policies.shuffle import shuffle
from moe_serve.eplb.rearrangement import ForEngine, Order
from moe_serve.eplb.rebalancer import Rebalancer
from moe_serve.executor.replies import combine_replies
from moe_serve.model.moe.expert_map import ExpertMap, even_copies
from moe_serve.model.moe.experts import Experts
from moe_serve.worker.eplb.expert_balance import ExpertBalance
from tests.support.balancing import answer_all, name_of, opened

CPU = torch.device("cpu")
LAYERS, EXPERTS, REDUNDANT, HIDDEN, WIDTH = 2, 4, 2, 2, 1
EXPERT_BYTES = 3 * HIDDEN * WIDTH * 4
Posted = tuple[Tensor, list[int]]


class Hub:
    """What the ranks of the migration group have posted, call by call."""

    def __init__(self, size: int, chance: random.Random) -> None:
        self.chance = chance
        self.calls: list[list[Posted]] = [[] for _ in range(size)]
        self.spoil = False
        """Change a byte of the next rows that travel."""

    def collect(self, call: int, rank: int) -> Tensor:
        """Rows for `rank` in a call that all have posted, in order of the senders."""
        parts = []
        for posted in self.calls:
            rows, counts = posted[call]
            first = sum(counts[:rank])
            parts.append(rows[first : first + counts[rank]])
        arrived = torch.cat(parts).clone()
        if self.spoil and arrived.numel():
            self.spoil = False
            arrived[0, 3] ^= 1
        return arrived


class FakeTransfer:
    def __init__(self, hub: Hub, call: int, rank: int) -> None:
        self._hub, self._call, self._rank = hub, call, rank

    def is_done(self) -> bool:
        posted = all(len(calls) > self._call for calls in self._hub.calls)
        return posted and self._hub.chance.random() < 0.6

    def wait(self) -> Tensor:
        return self._hub.collect(self._call, self._rank)


class FakeGroup:
    """A rank's end of the migration group."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self.rank, self.size, self.device = rank, len(hub.calls), CPU
        self._hub = hub

    def start_all_to_all_ragged(self, x: Tensor, send_counts: list[int], recv_counts: list[int]) -> FakeTransfer:
        calls = self._hub.calls[self.rank]
        calls.append((x.clone(), list(send_counts)))
        return FakeTransfer(self._hub, len(calls) - 1, self.rank)


@dataclass(slots=True)
class FakeLayer:
    experts: Experts
    expert_map: ExpertMap


class Rank:
    """One expert-parallel rank: an ExpertBalance over layers whose weights say which expert they are."""

    def __init__(self, rank: int, placement: Placement, hub: Hub, max_bytes: int) -> None:
        self.placement, self.rank = placement, rank
        self.layers = [FakeLayer(self._experts(layer), self._map(layer)) for layer in range(placement.num_layers)]
        group: Any = FakeGroup(hub, rank)
        layers: Any = dict(enumerate(self.layers))
        self.balance = ExpertBalance(layers, placement, group, group, max_bytes_per_step=max_bytes)

    def held(self) -> list[list[float]]:
        """By layer and slot, the number that all weights of the slot's expert have; nan if they differ."""
        return [
            [
                up.flatten()[0].item() if len({*up.flatten().tolist(), *down.flatten().tolist()}) == 1 else float("nan")
                for up, down in zip(layer.experts.gate_up, layer.experts.down, strict=True)
            ]
            for layer in self.layers
        ]

    def mapped(self) -> list[list[list[int]]]:
        """By layer and expert, the slots of its copies as the token path looks them up."""
        found = []
        for layer in self.layers:
            assert layer.expert_map.slots_EC is not None
            found.append([sorted(set(slots)) for slots in layer.expert_map.slots_EC.tolist()])
        return found

    def _experts(self, layer: int) -> Experts:
        held = self.placement.logical_of(layer, self.rank)
        experts = Experts(len(held), HIDDEN, WIDTH, torch.float32, CPU)
        for slot, expert in enumerate(held.tolist()):
            experts.gate_up[slot] = experts.down[slot] = weight_of(layer, expert)
        return experts

    def _map(self, layer: int) -> ExpertMap:
        row = self.placement.physical_to_logical_LP[layer].tolist()
        return ExpertMap(*even_copies(row, self.placement.num_logical), salt=1)


def weight_of(layer: int, expert: int) -> float:
    return float(100 * layer + expert + 1)


class FakeWorkers:
    """An executor: the ranks of one engine, whose replies are combined as by the mp executor."""

    def __init__(self, ranks: list[Rank], world: World) -> None:
        self.ranks = ranks
        self._world = world

    def submit(self, command: Command) -> Future[Reply]:
        future: Future[Reply] = Future()
        replies = [self._carry_out(rank, command) for rank in self.ranks]
        future.set_result(combine_replies(replies, sampling_worker=self._world.topology.sampling_worker))
        return future

    def start(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        return

    @torch.inference_mode()
    def _carry_out(self, rank: Rank, command: Command) -> Reply:
        match command:
            case StageExperts():
                rank.balance.stage(command)
                return Done()
            case SetShares():
                rank.balance.set_shares(command)
                return Done()
            case PollStage():
                return rank.balance.poll()
            case StepPlan():
                seconds = rank.balance.before_step(command)
                load = self._world.random_load() if command.collect_load and rank.rank == 0 else b""
                stage = rank.balance.status()
                return StepResult(step=command.step, load=load, stage=stage, commit_seconds=seconds)
            case _:
                raise AssertionError(f"unexpected {command}")


@dataclass(slots=True)
class Engine:
    rearranging: Rearranging
    workers: FakeWorkers
    naps: Naps = field(default_factory=Naps)
    inbox: list[Order | int] = field(default_factory=list)
    """From the coordinator; a number is a Wake of that nap."""
    outbox: list[News] = field(default_factory=list)
    work: int = 0
    vote: Vote | None = None


class World:
    """`reorder`: orders of the coordinator may overtake each other, as they cannot on one connection."""

    def __init__(self, seed: int, *, dp: int, tp: int = 1, reorder: bool = False, pieces_bytes: int = 1) -> None:
        self.chance = random.Random(seed)
        self.now = 0.0
        self.reorder = reorder
        self.steps = 0
        self.topology = Topology(dp=dp, tp=tp)
        placement = initial_placement(
            "linear", num_layers=LAYERS, num_experts=EXPERTS, num_ranks=dp * tp, num_redundant=REDUNDANT
        )
        config = EPLBConfig(
            window_size=20, step_interval=10**9, num_redundant_experts=REDUNDANT, policy="shuffle", min_gain=0
        )
        self.rebalancer = Rebalancer(
            config, self.topology, placement, policy=name_of(shuffle), expert_bytes=EXPERT_BYTES, unix_time=lambda: 7.0
        )
        self.hub = Hub(dp * tp, self.chance)
        self.engines = []
        for engine in range(dp):
            ranks = [Rank(engine * tp + each, placement, self.hub, pieces_bytes) for each in range(tp)]
            workers = FakeWorkers(ranks, self)
            rearranging = Rearranging(workers, collect_interval=3, clock=lambda: self.now)
            self.engines.append(Engine(rearranging, workers))

    @property
    def at_rest(self) -> bool:
        """Nothing travels, nobody has work, all sleep."""
        return not self.rebalancer.in_flight and all(
            each.naps.asleep and not (each.inbox or each.outbox or each.work or each.rearranging.active)
            for each in self.engines
        )

    def random_load(self) -> bytes:
        counts = [self.chance.randint(0, 9) for _ in range(LAYERS * 2 * EXPERTS)]
        return np.array(counts, dtype=np.int64).tobytes()

    def send(self, orders: list[ForEngine]) -> None:
        """Orders of the coordinator on their way, and those that follow from what it has worked out."""
        for each in [*orders, *answer_all(self.rebalancer, self.now)]:
            self._post(self.engines[each.dp].inbox, opened(each.order))

    def arrive(self, dp: int, steps: int) -> None:
        """A request for some steps."""
        self.engines[dp].work += steps

    def coordinate(self) -> None:
        """The coordinator reads one message, if there is one, and looks at its clock."""
        waiting = [(dp, each) for dp, each in enumerate(self.engines) if each.outbox]
        if waiting:
            dp, engine = self.chance.choice(waiting)
            news = engine.outbox.pop(0)
            if isinstance(news, StageReport):
                self.send(self.rebalancer.hear_stage(dp, news, self.now))
            else:
                assert isinstance(news, StepLoad)
                self.send(self.rebalancer.hear_load(news, self.now))
        self.send(self.rebalancer.tick(self.now))

    def move(self, dp: int) -> None:
        """An engine hears one message or goes on, as EngineProcess does between turns, then votes if awake."""
        engine = self.engines[dp]
        if engine.vote is not None:
            return
        if engine.inbox and self.chance.random() < 0.5:
            self._hear(engine, engine.inbox.pop(0))
        if engine.naps.asleep and engine.rearranging.active and self.chance.random() < 0.7:
            engine.rearranging.poll()
        engine.outbox += engine.rearranging.take_news()
        if engine.naps.asleep and (engine.work or engine.rearranging.wants_turn):
            nap = engine.naps.wake_up()
            for other in self.engines:
                if other is not engine:
                    other.inbox.insert(self.chance.randint(0, len(other.inbox)), nap)
        if not engine.naps.asleep:
            bare = Vote(self.steps + 1, engine.naps.taken, engine.work > 0, engine.work)
            engine.vote = engine.rearranging.vote(bare)
        if all(each.vote is not None for each in self.engines):
            self._turn()

    def check(self) -> None:
        """All ranks hold and look up what one placement says: nothing is half-applied."""
        ranks = [rank for engine in self.engines for rank in engine.workers.ranks]
        placements = [rank.balance._migrator.rows for rank in ranks]
        assert all(rows == placements[0] for rows in placements), "ranks disagree about the placement"
        table = [placements[0][layer] for layer in range(LAYERS)]
        served = Placement(np.array(table), self.rebalancer.placement.offsets, EXPERTS)
        served.check()
        copies = served.logical_to_physical().tolist()
        expected = [[[slot for slot in slots if slot >= 0] for slots in layer] for layer in copies]
        for rank in ranks:
            assert rank.mapped() == expected, f"rank {rank.rank} looks experts up elsewhere"
            wanted = [
                [weight_of(layer, expert) for expert in served.logical_of(layer, rank.rank).tolist()]
                for layer in range(LAYERS)
            ]
            assert rank.held() == wanted, f"rank {rank.rank} holds other weights"

    def _hear(self, engine: Engine, message: Order | int) -> None:
        match message:
            case int():
                engine.naps.hear(message)
            case StageExperts() | SetShares() | DropStage() | Record():
                engine.rearranging.hear(message)

    def _post(self, inbox: list[Order | int], order: Order) -> None:
        place = self.chance.randint(0, len(inbox)) if self.reorder else len(inbox)
        inbox.insert(place, order)

    def _turn(self) -> None:
        """All have voted: they do what the verdict says, one after the other in any order."""
        self.steps += 1
        votes = [each.vote for each in self.engines if each.vote is not None]
        verdict = decide(votes)
        for engine in self.chance.sample(self.engines, len(self.engines)):
            engine.vote = None
            if not verdict.run:
                engine.naps.fall_asleep()
                continue
            bare = StepPlan(step=self.steps, scheduled=[], tokens_by_dp_rank=verdict.tokens_by_dp_rank)
            plan = engine.rearranging.plan(bare, verdict)
            result = engine.workers.submit(plan).result()
            assert isinstance(result, StepResult)
            engine.rearranging.learn(plan, result)
            engine.work = max(0, engine.work - 1)
        self.check()
