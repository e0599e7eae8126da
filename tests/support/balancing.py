"""A Rebalancer with loads and engines that answer, for tests of what it decides."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moe_serve.base.commands import SetShares, StageExperts
from moe_serve.base.messages import DropStage, StageReport, StageState, StepLoad
from moe_serve.base.parallel_config import EPLBConfig
from moe_serve.base.topology import Topology
from moe_serve.eplb.placement import Placement, initial_placement
from moe_serve.eplb.policies.base import Policy
from moe_serve.eplb.policies.shuffle import shuffle
from moe_serve.eplb.rearrangement import ForEngine, Order
from moe_serve.eplb.rebalancer import Rebalancer

LAYERS, EXPERTS = 3, 8
EXPERT_BYTES = 1000
UNIX_TIME = 1_700_000_000.0
Counts = npt.NDArray[np.int64]


class Balanced:
    """A rebalancer of `dp` engines with `tp` ranks each; every call passes on its time."""

    def __init__(
        self,
        *,
        dp: int = 2,
        tp: int = 1,
        policy: Policy = shuffle,
        expert_bytes: int = EXPERT_BYTES,
        num_redundant: int = 2,
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
            policy=policy,
            expert_bytes=expert_bytes,
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
        orders = self.rebalancer.hear_load(StepLoad(step=self.step, steps=steps, load=counts.tobytes()), self.now)
        return of_all(orders)

    def report(self, dp: int, state: StageState, epoch: int, **fields: object) -> list[Order]:
        self.now += 0.5
        report = StageReport(epoch=epoch, state=state, **fields)  # type: ignore[arg-type]
        return of_all(self.rebalancer.hear_stage(dp, report, self.now))

    def begin(self, placement: Placement | None = None) -> list[StageExperts]:
        """Apply a plan; the stages, one per engine."""
        plan = self.rebalancer.propose() if placement is None else self.rebalancer.predict(placement)
        return stages(of_all(self.rebalancer.apply(plan, self.now, why="request")))

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
            fields = {"stage_seconds": 2.0, "commit_seconds": 0.25, "bytes_received": 300}
            first = stages(self.all_report("committed", first[0].epoch, **fields))
        return chunks


def skewed(seed: int = 0) -> Counts:
    """(L, 2, E): a few experts have most of the load, others in each layer."""
    generator = np.random.default_rng(seed)
    counts = generator.zipf(1.5, size=(LAYERS, 2, EXPERTS)).clip(1, 1000)
    return np.asarray(counts, dtype=np.int64)


def of_all(orders: list[ForEngine]) -> list[Order]:
    """The orders in order of engine: each of them gets one of a kind."""
    return [each.order for each in sorted(orders, key=lambda each: each.dp)]


def stages(orders: list[Order]) -> list[StageExperts]:
    return [order for order in orders if isinstance(order, StageExperts)]


def drops(orders: list[Order]) -> list[int]:
    return [order.epoch for order in orders if isinstance(order, DropStage)]


def shares(orders: list[Order]) -> list[SetShares]:
    return [order for order in orders if isinstance(order, SetShares)]
