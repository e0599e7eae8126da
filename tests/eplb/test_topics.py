"""Traffic that changes its topic, by what the default model's experts see of four of them: what moves, and what for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_serve.base.balance_messages import StageReport, StepLoad
from moe_serve.base.eplb_config import EPLBConfig
from moe_serve.base.topology import Topology
from moe_serve.eplb.placement import initial_placement
from moe_serve.eplb.policies.base import Floats
from moe_serve.eplb.rebalancer import Rebalancer
from moe_serve.eplb.saving import Slots
from moe_serve.eplb.search.scores import mean_of_ratios
from moe_serve.eplb.search.weights import split_loads
from tests.support.balancing import answer_all, of_all, stages

FILE = Path(__file__).parents[2] / "bench" / "default_model" / "expert-load.json"
TOP_K, BUCKET, STRETCH = 4, 5, 400
ROW, WEIGHTS = 1e-6, 12e-6
"""Seconds of a row, and of an expert that has any."""
EXPERT_BYTES = 98_304


class Served:
    """`rows` a step on `dp` ranks, whose experts take seconds by the model and everything else `other` seconds."""

    def __init__(self, dp: int, *, rows: int, other: float, policy: str = "sticky") -> None:
        self.rows, self.other, self.numbers = rows, other, np.random.default_rng(0)
        self.topics = [np.array(shares) for shares in json.loads(FILE.read_text())["shares"].values()]
        layers, experts = self.topics[0].shape
        self.rebalancer = Rebalancer(
            EPLBConfig(window_size=100, step_interval=200, num_redundant_experts=4, policy=policy),
            Topology(dp=dp),
            initial_placement("linear", num_layers=layers, num_experts=experts, num_ranks=dp, num_redundant=4),
            expert_bytes=EXPERT_BYTES,
            unix_time=lambda: 0.0,
        )
        self.dp, self.step, self.now, self.balancedness = dp, 0, 0.0, list[float]()

    def run(self) -> float:
        """All topics twice; the mean balancedness of the window."""
        for shares_LE in self.topics * 2:
            for _ in range(STRETCH // BUCKET):
                self._bucket(shares_LE / shares_LE.sum(axis=1, keepdims=True))
        return float(np.mean(self.balancedness))

    def _bucket(self, shares_LE: Floats) -> None:
        rebalancer = self.rebalancer
        load_LE = self.numbers.multinomial(TOP_K * self.rows * BUCKET, shares_LE).astype(np.float64)
        split = rebalancer.situation().forecast.split(load_LE, rebalancer.placement)
        slots = Slots(split_loads(split, load_LE) / BUCKET, rebalancer.placement.offsets)
        rows_R, used_R = slots.of_ranks()
        step_seconds = self.other + ROW * slots.slowest(WEIGHTS / ROW)
        self.step, self.now = self.step + BUCKET, self.now + BUCKET * step_seconds
        told = StepLoad(
            step=self.step,
            steps=BUCKET,
            load=np.stack([0 * load_LE, load_LE], axis=1).astype(np.int64).tobytes(),
            step_seconds=BUCKET * step_seconds,
            expert_seconds=(BUCKET * (ROW * rows_R + WEIGHTS * used_R)).tolist(),
        )
        orders = [*rebalancer.hear_load(told, self.now), *answer_all(rebalancer, self.now)]
        while staged := stages(of_all(orders)):
            reports = [
                StageReport(
                    epoch=staged[0].epoch, state="committed", commit_seconds=0.0005, bytes_received=EXPERT_BYTES
                )
                for _ in range(self.dp)
            ]
            news = [each for dp, report in enumerate(reports) for each in rebalancer.hear_stage(dp, report, self.now)]
            orders = [*news, *answer_all(rebalancer, self.now)]
        loads_LR = rebalancer.situation().forecast.rank_loads(rebalancer.load(), rebalancer.placement)
        self.balancedness.append(mean_of_ratios(loads_LR))


@pytest.mark.long
def test_topics_are_followed_where_experts_take_a_good_part_of_a_step() -> None:
    still = Served(4, rows=128, other=0.003, policy="static").run()
    served = Served(4, rows=128, other=0.003)
    assert still < 0.82
    assert served.run() > 0.9
    assert served.rebalancer.totals.rebalances >= 4
    assert all(entry["judgement"]["net"] > 0 for entry in served.rebalancer.history if "judgement" in entry)  # type: ignore[index]


def test_few_rows_on_two_ranks_are_left_where_they_are() -> None:
    """They are quite balanced, and experts take little of a step: moving would cost more than it brings."""
    served = Served(2, rows=16, other=0.01)
    assert served.run() > 0.9
    assert served.rebalancer.totals.rebalances <= 1
    assert set(served.rebalancer.totals.skipped) <= {"small_gain", "within_noise", "no_moves"}
    assert served.rebalancer.totals.skipped.total() >= 10


@pytest.mark.parametrize("dp", [2, pytest.param(4, marks=pytest.mark.long)])
def test_experts_that_take_nothing_of_a_step_never_move(dp: int) -> None:
    served = Served(dp, rows=16, other=10.0)
    served.run()
    assert served.rebalancer.totals.rebalances == 0
