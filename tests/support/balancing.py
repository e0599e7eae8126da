"""A Rebalancer with loads and engines that answer, for tests of what it decides."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from moe_serve.base.balance_messages import DropStage, StageReport, StageState, StepLoad
from moe_serve.base.commands import SetShares, StageExperts
from moe_serve.base.eplb_config import EPLBConfig
from moe_serve.base.parcel import Parcel
from moe_serve.base.topology import Topology
from moe_serve.eplb.placement import Placement, initial_placement
from moe_serve.eplb.policies.base import Policy
from moe_serve.eplb.policies.shuffle import shuffle
from moe_serve.eplb.questions import Question, Solved
from moe_serve.eplb.rearrangement import ForEngine, Order, Proposal
from moe_serve.eplb.rebalancer import ROLLBACK, Rebalancer
from moe_serve.eplb.solving import predict, propose, solve

LAYERS, EXPERTS = 3, 8
EXPERT_BYTES = 1000
UNIX_TIME = 1_700_000_000.0
Counts = npt.NDArray[np.int64]
_order: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)


class Balanced:
    """A rebalancer of `dp` engines with `tp` ranks each, whose questions are answered at once.

    Every call passes on its time.
    """

    def __init__(
        self,
        *,
        dp: int = 2,
        tp: int = 1,
        policy: Policy = shuffle,
        expert_bytes: int = EXPERT_BYTES,
        num_redundant: int = 2,
        num_groups: int = 1,
        **config: object,
    ) -> None:
        values = {"step_interval": 100, "window_size": 100, "min_gain": 0, "num_redundant_experts": num_redundant}
        self.now = 50.0
        self.step = 0
        self.rebalancer = Rebalancer(
            EPLBConfig(**(values | config)),
            Topology(dp=dp, tp=tp),
            initial_placement(
                "linear", num_layers=LAYERS, num_experts=EXPERTS, num_ranks=dp * tp, num_redundant=num_redundant
            ),
            policy=name_of(policy),
            expert_bytes=expert_bytes,
            num_groups=num_groups,
            unix_time=lambda: UNIX_TIME,
        )

    @property
    def table(self) -> list[list[int]]:
        rows: list[list[int]] = self.rebalancer.placement.physical_to_logical_LP.tolist()
        return rows

    def load(self, counts: Counts | None = None, *, steps: int = 1, seconds: float = 0.01) -> list[Order]:
        """A bucket of `steps` steps, `seconds` each; the orders that follow. `counts` (L, 2, E)."""
        self.step += steps
        self.now += steps * seconds
        counts = skewed() if counts is None else counts
        told = StepLoad(step=self.step, steps=steps, load=counts.tobytes(), step_seconds=steps * seconds)
        orders = self.rebalancer.hear_load(told, self.now)
        return self.settled(orders)

    def report(self, dp: int, state: StageState, epoch: int, **fields: object) -> list[Order]:
        self.now += 0.5
        report = StageReport(epoch=epoch, state=state, **fields)  # type: ignore[arg-type]
        return self.settled(self.rebalancer.hear_stage(dp, report, self.now))

    def begin(self, placement: Placement | None = None) -> list[StageExperts]:
        """Apply a plan; the stages, one per engine."""
        return self.apply(self.propose() if placement is None else self.predict(placement))

    def apply(self, plan: Proposal, *, why: str = "request") -> list[StageExperts]:
        """Carry a plan out; the stages, one per engine."""
        return stages(self.settled(self.rebalancer.apply(plan, self.now, why=why)))

    def rollback(self) -> list[StageExperts]:
        """Back to what was served before the last rearrangement; the stages, one per engine."""
        assert self.rebalancer.previous is not None
        return self.apply(self.predict(self.rebalancer.previous), why=ROLLBACK)

    def propose(self) -> Proposal:
        """What the policy would do."""
        return propose(self.rebalancer.situation(), self.rebalancer.policy)

    def predict(self, placement: Placement) -> Proposal:
        """What a placement would bring."""
        return predict(self.rebalancer.situation(), placement)

    def settled(self, orders: list[ForEngine]) -> list[Order]:
        """These orders, and those that follow from the answers to all questions."""
        return of_all([*orders, *answer_all(self.rebalancer, self.now)])

    def all_report(self, state: StageState, epoch: int, **fields: object) -> list[Order]:
        """The same news from every engine; the orders that follow the last one."""
        orders: list[Order] = []
        for dp in range(self.rebalancer.topology.dp):
            orders = self.report(dp, state, epoch, **fields)
        return orders

    def finish(self, first: list[StageExperts]) -> int:
        """Commit chunk by chunk until the rearrangement is over; how many there were."""
        chunks = 0
        while first:
            chunks += 1
            self.all_report("staged", first[0].epoch)
            fields = {"stage_seconds": 2.0, "commit_seconds": 0.25, "busy_seconds": 0.05, "bytes_received": 300}
            first = stages(self.all_report("committed", first[0].epoch, **fields))
        return chunks


def skewed(seed: int = 0) -> Counts:
    """(L, 2, E): a few experts have most of the load, others in each layer."""
    generator = np.random.default_rng(seed)
    counts = generator.zipf(1.5, size=(LAYERS, 2, EXPERTS)).clip(1, 1000)
    return np.asarray(counts, dtype=np.int64)


def name_of(policy: Policy) -> str:
    """A policy as whoever solves it finds it."""
    return f"{policy.__module__}:{policy.__qualname__}"  # type: ignore[attr-defined]


def solved(question: Question, *, seconds: float = 0.0) -> Solved:
    """The answer to a question, as if that had taken so long."""
    result, bodies = solve(question)
    return Solved(question.number, seconds, result, tuple(Parcel.of(body) for body in bodies))


def answer_all(rebalancer: Rebalancer, now: float) -> list[ForEngine]:
    """The orders that follow once nothing is left to be worked out."""
    orders: list[ForEngine] = []
    while questions := rebalancer.take_questions():
        for question in questions:
            orders += rebalancer.hear_solved(solved(question), now)
    return orders


def opened(order: Order | Parcel) -> Order:
    """An order as its engine reads it."""
    return _order.decode(order.join()) if isinstance(order, Parcel) else order


def of_all(orders: list[ForEngine]) -> list[Order]:
    """The orders in order of engine: each of them gets one of a kind."""
    return [opened(each.order) for each in sorted(orders, key=lambda each: each.dp)]


def stages(orders: list[Order]) -> list[StageExperts]:
    return [order for order in orders if isinstance(order, StageExperts)]


def drops(orders: list[Order]) -> list[int]:
    return [order.epoch for order in orders if isinstance(order, DropStage)]


def shares(orders: list[Order]) -> list[SetShares]:
    return [order for order in orders if isinstance(order, SetShares)]
