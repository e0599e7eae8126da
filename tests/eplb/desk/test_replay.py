"""Replaying recorded loads: planned on one window, scored on the next."""

from __future__ import annotations

import numpy as np
import pytest

from bench.traces import GENERATORS, lognormal, trace
from moe_serve.base.errors import ConfigError
from moe_serve.eplb.desk.loads import Trace
from moe_serve.eplb.desk.replay import Gain, ReplayWorld, redundancy_curve, replay, score_steps, worthwhile
from moe_serve.eplb.placement import Placement

WORLD = ReplayWorld(num_ranks=8, num_nodes=2, expert_bytes=1000)


@pytest.fixture(scope="module")
def drifting() -> Trace:
    generator = np.random.default_rng(0)
    return Trace(trace(generator, lognormal(generator, 5, 3, 64), steps=10, tokens=4096))


def test_what_is_scored_was_not_seen_when_planning(drifting: Trace) -> None:
    spoiled = drifting.count_SLE.copy()
    spoiled[-10:] = np.random.default_rng(1).permuted(spoiled[-10:], axis=2)
    options = {"policies": ["sticky"], "redundancies": [8], "window_steps": 10}
    seen, other = (replay(t, WORLD, **options)[0] for t in (drifting, Trace(spoiled)))  # type: ignore[arg-type]
    assert len(seen.balancedness) == 4
    assert seen.moved_experts == other.moved_experts
    assert seen.balancedness[:3] == other.balancedness[:3]
    assert other.balancedness[3] < seen.balancedness[3]


def test_every_policy_and_redundancy_is_scored(drifting: Trace) -> None:
    outcomes = replay(
        drifting, WORLD, policies=["sticky", "deepseek", "static", "shuffle"], redundancies=[0, 8], window_steps=10
    )
    by_name = {(outcome.policy, outcome.num_redundant): outcome.summary() for outcome in outcomes}
    assert len(by_name) == 8
    for num_redundant in (0, 8):
        sticky, deepseek, static = (by_name[name, num_redundant] for name in ("sticky", "deepseek", "static"))
        assert static["moved_experts"] == 0
        assert sticky["balancedness"] > static["balancedness"]
        assert sticky["moved_share"] < deepseek["moved_share"] / 3
        assert sticky["moved_bytes"] == 1000 * sticky["moved_experts"]
        assert sticky["step_seconds"] < static["step_seconds"]
    assert by_name["shuffle", 8]["moved_share"] > 0.5
    assert by_name["sticky", 8]["balancedness_uneven"] > by_name["sticky", 8]["balancedness"]


def test_a_step_takes_as_long_as_its_slowest_rank_in_each_layer() -> None:
    placement = Placement(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), (0, 2, 4), 4)
    steps = np.array([[[5, 0, 3, 3], [1, 1, 1, 1]]], dtype=float)
    balanced, seconds = score_steps(steps, placement, ReplayWorld(2, row_seconds=1.0, expert_seconds=10.0))
    assert balanced == pytest.approx((5.5 / 6 + 1) / 2)
    assert seconds == (6 + 20) + (2 + 20)


def test_redundancy_pays_while_it_saves_enough(drifting: Trace) -> None:
    outcomes = replay(drifting, WORLD, policies=["sticky"], redundancies=[0, 8, 16], window_steps=10)
    gains = redundancy_curve(outcomes, WORLD, num_layers=3)
    assert [gain.num_redundant for gain in gains] == [0, 8, 16]
    assert gains[0].saved_share == 0
    assert [gain.bytes_per_rank for gain in gains] == [0, 3000, 6000]
    assert worthwhile(gains, 0.0) == 16
    assert worthwhile(gains, 1.0) == 0


def test_a_dip_in_the_curve_does_not_end_the_search() -> None:
    saved = {0: 0.0, 8: 0.05, 16: 0.049, 32: 0.12, 64: 0.125}
    gains = [Gain(count, 0, 0, 0, 0, share, 0) for count, share in saved.items()]
    assert worthwhile(gains, 0.001) == 32


def test_a_trace_of_one_window_is_refused(drifting: Trace) -> None:
    with pytest.raises(ConfigError, match="50 steps holds 1 windows of 40; at least 2"):
        replay(drifting, WORLD, policies=["sticky"], redundancies=[0], window_steps=40)


@pytest.mark.parametrize("kind", list(GENERATORS))
def test_generated_popularities_sum_to_one(kind: str) -> None:
    popularity = GENERATORS[kind](np.random.default_rng(0), 4, 2, 32)
    assert popularity.shape == (4, 2, 32)
    assert np.allclose(popularity.sum(axis=-1), 1)
    assert popularity.min() > 0
