"""Whether a rearrangement pays: hand-computed, and what must hold for every plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.base.eplb_config import EPLBConfig
from moe_serve.eplb.gate import ASSUMED_EXPERT_SHARE, SURE_ERRORS, Judgement, judge, objection
from moe_serve.eplb.placement import Placement
from moe_serve.eplb.rearrangement import Proposal
from moe_serve.eplb.saving import Saving

PLACED = Placement(np.array([[0, 1]]), (0, 1, 2), 2)
STEP, SPEED = 0.010, 1e9


def plan(saving: Saving, *, num_bytes: int = 1_000_000) -> Proposal:
    return Proposal(0, PLACED, 0.8, 0.9, 0.1, [8], num_bytes, [[0]], saving)


def saving(
    before: float, after: float, *, noise: float = 0.0, row_seconds: float = 1e-5, step_seconds: float = STEP
) -> Saving:
    return Saving(before, after, noise, weight_rows=16.0, row_seconds=row_seconds, step_seconds=step_seconds)


def judged(of: Saving, *, interval: int = 100, num_bytes: int = 1_000_000) -> Judgement:
    return judge(plan(of, num_bytes=num_bytes), bytes_per_second=SPEED, step_interval=interval)


def refused(of: Saving, *, min_gain: float = 0.01, interval: int = 100, num_bytes: int = 1_000_000) -> str | None:
    config = EPLBConfig(min_gain=min_gain, step_interval=interval)
    judgement = judged(of, interval=interval, num_bytes=num_bytes)
    answer = objection(plan(of, num_bytes=num_bytes), judgement, config)
    return None if answer is None else answer[0]


def test_by_hand() -> None:
    """400 rows of 10 us are 4 ms of a step of 10 ms; 40 rows less are 4 %; a MB at 1 GB/s is 1 ms of 100 x 10 ms."""
    found = judged(saving(400, 360, noise=10))
    assert found.expert_share == pytest.approx(0.4)
    assert found.gain == pytest.approx(0.04)
    assert found.noise == pytest.approx(0.01)
    assert found.cost == pytest.approx(0.001)
    assert found.net == pytest.approx(0.039)


def test_where_nothing_is_measured_experts_are_assumed_to_take_a_share() -> None:
    found = judged(saving(400, 360, row_seconds=0.0))
    assert found.expert_share == ASSUMED_EXPERT_SHARE
    assert found.gain == pytest.approx(ASSUMED_EXPERT_SHARE * 0.1)
    early = judged(saving(400, 360, step_seconds=0.0))
    assert (early.expert_share, early.cost) == (ASSUMED_EXPERT_SHARE, 0.0)
    assert judged(saving(0, 0)).gain == 0.0


def test_experts_never_take_more_than_the_step() -> None:
    assert judged(saving(400, 300, row_seconds=1.0)).gain == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("of", "options", "reason"),
    [
        (saving(400, 360), {}, None),
        (saving(400, 396), {}, "small_gain"),
        (saving(400, 396), {"min_gain": 0.002}, None),
        (saving(400, 396), {"min_gain": 0.002, "interval": 10}, "small_gain"),
        (saving(400, 396), {"min_gain": 0.002, "num_bytes": 10_000_000}, "small_gain"),
        (saving(400, 360, noise=26), {}, None),
        (saving(400, 360, noise=27), {}, "within_noise"),
        (saving(400, 410), {}, "small_gain"),
        (saving(400, 410), {"min_gain": 0}, None),
        (saving(400, 360, row_seconds=1e-7), {}, "small_gain"),
    ],
)
def test_what_does_not_pay_is_refused_with_its_reason(
    of: Saving, options: dict[str, float], reason: str | None
) -> None:
    assert refused(of, **options) == reason  # type: ignore[arg-type]


def test_the_sentence_says_gain_cost_and_what_experts_take() -> None:
    config = EPLBConfig(min_gain=0.05, step_interval=100)
    answer = objection(plan(saving(400, 360)), judged(saving(400, 360)), config)
    assert answer is not None
    assert answer[1] == (
        "moving 8 experts would save 4.00% of the time of a step and cost 0.10% over the next 100 steps; what is left "
        "is less than min_gain (5.00%). Experts take 40.0% of a step"
    )
    uncertain = saving(400, 360, noise=50)
    answer = objection(plan(uncertain), judged(uncertain), config)
    assert answer is not None
    assert answer[1].endswith("4.00% of the time of a step, give or take 5.00%: that may be chance")
    worse = saving(400, 410)
    answer = objection(plan(worse), judged(worse), config)
    assert answer is not None
    assert answer[1].startswith("moving 8 experts would lose 1.00% of the time of a step and cost 0.10%")


def test_a_plan_that_changes_nothing_is_no_move_even_if_everything_is_to_be_applied() -> None:
    nothing = Proposal(0, PLACED, 0.8, 0.8, 0.0, [0], 0, [], saving(400, 400))
    for min_gain in (0.0, 0.01):
        answer = objection(nothing, judged(saving(400, 400)), EPLBConfig(min_gain=min_gain))
        assert answer is not None
        assert answer[0] == "no_moves"


numbers = st.floats(0, 1e6)
savings = st.builds(
    Saving,
    before=numbers,
    after=numbers,
    noise=numbers,
    weight_rows=st.just(1.0),
    row_seconds=st.floats(0, 1e-3),
    step_seconds=st.floats(0, 10),
)


@given(savings, st.floats(1, 1e12), st.integers(0, 1 << 40), st.integers(1, 10_000))
def test_nothing_is_accepted_that_loses_by_the_gate_s_own_model(
    of: Saving, speed: float, num_bytes: int, interval: int
) -> None:
    """In seconds, worked out anew: what an interval of steps gets back against what the move takes."""
    proposal = plan(of, num_bytes=num_bytes)
    found = judge(proposal, bytes_per_second=speed, step_interval=interval)
    if objection(proposal, found, EPLBConfig(min_gain=1e-6, step_interval=interval)) is not None:
        return
    assert of.after < of.before
    assert of.rows > SURE_ERRORS * of.noise * (1 - 1e-9)
    if of.step_seconds and of.row_seconds:
        saved = min(of.row_seconds * of.before, of.step_seconds) * of.share * interval
        assert saved > num_bytes / speed


@given(st.floats(0.05, 0.9), st.floats(0.1, 1.0), st.integers(100, 10_000))
def test_a_clear_gain_is_accepted(share: float, of_step: float, interval: int) -> None:
    """Experts take at least a tenth of a step and their slowest ranks get faster by 5 %; moving costs a step."""
    row_seconds = of_step * STEP / 1000
    clear = saving(1000, 1000 * (1 - share), noise=100 * share, row_seconds=row_seconds)
    moved = int(0.1 * STEP * SPEED)
    assert refused(clear, min_gain=0.002, interval=interval, num_bytes=moved) is None
