"""What another placement saves of a step: against steps that were drawn, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.eplb.forecast import Forecast
from moe_serve.eplb.placement import Placement, initial_placement
from moe_serve.eplb.policies.base import Floats, problem_of
from moe_serve.eplb.policies.sticky import sticky
from moe_serve.eplb.saving import (
    USUAL_WEIGHT_ROWS,
    Saving,
    Slots,
    WindowPart,
    expected_largest,
    saving_of,
    weight_rows_of,
)

DRAWS = 20_000


def drawn_slowest(slots: Slots, weight_rows: float) -> float:
    """The mean over many steps of what the slowest ranks cost, each expert's rows drawn by themselves."""
    counts_NLP = np.random.default_rng(0).poisson(slots.rows_LP, size=(DRAWS, *slots.rows_LP.shape))
    costs_NLP = counts_NLP + weight_rows * (counts_NLP > 0)
    ranks_NLR = np.add.reduceat(costs_NLP, np.array(slots.offsets[:-1]), axis=-1)
    return float(ranks_NLR.max(axis=-1).sum(axis=-1).mean())


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_the_largest_of_normal_numbers_is_what_draws_say(ranks: int) -> None:
    numbers = np.random.default_rng(ranks)
    mean_XR, deviation_XR = numbers.random((4, ranks)) * 3, numbers.random((4, ranks)) + 0.1
    drawn_X = (mean_XR + deviation_XR * numbers.standard_normal((100_000, 4, ranks))).max(axis=-1).mean(axis=0)
    np.testing.assert_allclose(expected_largest(mean_XR, deviation_XR), drawn_X, atol=0.02)


def test_two_alike_are_above_their_mean_by_a_known_part_and_certain_numbers_by_none() -> None:
    assert expected_largest(np.zeros((1, 2)), np.ones((1, 2)))[0] == pytest.approx(1 / math.sqrt(math.pi), abs=1e-3)
    assert expected_largest(np.array([[3.0, 0.0, 2.0]]), np.zeros((1, 3)))[0] == pytest.approx(3.0)


@pytest.mark.parametrize("weight_rows", [0.0, 1.0, 20.0])
@pytest.mark.parametrize("rows", [0.3, 2.0, 40.0])
def test_the_slowest_ranks_cost_what_drawn_steps_cost(rows: float, weight_rows: float) -> None:
    rows_LP = np.random.default_rng(1).exponential(rows, size=(2, 12))
    rows_LP[0, :3] *= 4
    slots = Slots(rows_LP, (0, 3, 6, 9, 12))
    assert slots.slowest(weight_rows) == pytest.approx(drawn_slowest(slots, weight_rows), rel=0.04)


def test_a_rank_without_rows_costs_nothing() -> None:
    assert Slots(np.array([[7.0, 0.0]]), (0, 1, 2)).slowest(0.0) == pytest.approx(7.0, abs=0.01)
    assert Slots(np.zeros((2, 4)), (0, 2, 4)).slowest(5.0) == 0.0


def loaded(rows_E: list[float]) -> tuple[list[WindowPart], Forecast, Placement]:
    """One layer on two ranks, seen in four parts of ten steps that are alike; what a step brings each expert."""
    served = initial_placement("linear", num_layers=1, num_experts=len(rows_E), num_ranks=2)
    return [WindowPart(10, 10 * np.array([rows_E]), 0.1, [])] * 4, Forecast((), True, 1000), served


def saved(rows_E: list[float], *, weight_rows: float | None = None) -> Saving:
    """What the policy that serves would save; seconds of an expert's weights are worth so many rows."""
    parts, forecast, served = loaded(rows_E)
    load_LE: Floats = np.sum([part.load_LE for part in parts], axis=0)
    wanted = sticky(problem_of(load_LE, num_ranks=2, current=served))
    if weight_rows is not None:
        slots = Slots(parts[0].load_LE / 10, served.offsets)
        parts = [WindowPart(10, part.load_LE, 0.1, seconds(slots, weight_rows)) for part in parts]
    saving = forecast.plan(load_LE, served, wanted, parts=parts).saving
    assert saving is not None
    return saving


def seconds(slots: Slots, weight_rows: float, *, row: float = 1e-6, steps: int = 10) -> list[float]:
    """What ranks take that follow the model."""
    rows_R, used_R = slots.of_ranks()
    found: list[float] = (steps * row * (rows_R + weight_rows * used_R)).tolist()
    return found


HOT = [6.0, 6.0, 6.0, 6.0, 1.0, 1.0, 1.0, 1.0]
"""Hot experts together: 24 of 28 rows on one of two ranks; evenly they would be 14 and 14."""


def test_many_rows_save_what_their_peak_falls_by() -> None:
    saving = saved([1000 * rows for rows in HOT], weight_rows=0.0)
    assert saving.before == pytest.approx(24_000, rel=0.01)
    assert saving.share == pytest.approx(1 - 14 / 24, abs=0.01)
    assert saving.noise == 0.0, "the parts are alike"


def test_few_rows_save_less_for_chance_makes_a_slowest_rank_anyway() -> None:
    shares = [saved([rows * scale for rows in HOT], weight_rows=0.0).share for scale in (1000, 1, 0.1, 0.01)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.5 * shares[0]
    even = saved([0.5, 0.5, 0.5, 0.5, 0.4, 0.5, 0.4, 0.5], weight_rows=0.0)
    assert 0 <= even.share < 0.01, "5 % of the rows, but a rank's draw varies by more than that"


def test_where_weights_are_the_cost_rows_may_lie_anywhere() -> None:
    """Every expert is used in nearly every step: both ranks read four experts' weights, before and after."""
    saving = saved([10 * rows for rows in HOT], weight_rows=2000.0)
    assert saving.weight_rows > 200, "as far as an almost even load can tell"
    assert saving.share < 0.1
    assert saved([10 * rows for rows in HOT], weight_rows=0.0).share > 0.35


@given(st.floats(0, 60), st.floats(0.3, 3), st.integers(0, 20))
def test_what_weights_are_worth_is_seen_in_how_ranks_differ(weight_rows: float, slow: float, seed: int) -> None:
    """However slow the machine was meanwhile."""
    numbers = np.random.default_rng(seed)
    slots = [Slots(numbers.exponential([[20.0] * 4 + [1.0] * 4], (2, 8)), (0, 4, 8)) for _ in range(6)]
    parts = [
        WindowPart(10, np.zeros((2, 8)), 0.1, seconds(of_part, weight_rows, row=2e-6 * slow ** (number % 2)))
        for number, of_part in enumerate(slots)
    ]
    assert weight_rows_of(parts, slots) == pytest.approx(weight_rows, rel=0.35, abs=2.5)


def test_without_measurements_or_differences_the_usual_holds() -> None:
    uneven = [Slots(np.array([[5.0, 1.0, 1.0, 1.0]]), (0, 2, 4))]
    assert weight_rows_of([WindowPart(1, np.zeros((1, 4)), 0.0, [])], uneven) == pytest.approx(USUAL_WEIGHT_ROWS)
    even = [Slots(np.array([[3.0, 1.0, 3.0, 1.0]]), (0, 2, 4))]
    assert weight_rows_of([WindowPart(1, np.zeros((1, 4)), 0.0, [1.0, 1.1])], even) == pytest.approx(USUAL_WEIGHT_ROWS)
    assert weight_rows_of([WindowPart(1, np.zeros((1, 4)), 0.0, [1.0, 1.0])], [Slots(np.zeros((1, 4)), (0, 2, 4))]) > 0


def test_a_row_costs_what_was_measured() -> None:
    saving = saved([10 * rows for rows in HOT], weight_rows=0.0)
    of_one = saving.row_seconds * (280 + saving.weight_rows * 8)
    assert of_one == pytest.approx(280e-6, rel=0.01), "of one step, both ranks together"
    assert saving.step_seconds == pytest.approx(0.01)
    assert saved(HOT).row_seconds == 0.0


def test_what_experts_take_is_compared_with_the_steps_in_which_they_were_timed() -> None:
    parts, forecast, served = loaded(HOT)
    timed = [WindowPart(10, parts[0].load_LE, 0.3, [0.1, 0.05])]
    saving = forecast.plan(parts[0].load_LE, served, served, parts=[*parts, *timed]).saving
    assert saving is not None
    assert saving.step_seconds == pytest.approx(0.03)
    assert forecast.plan(parts[0].load_LE, served, served, parts=parts).saving.step_seconds == pytest.approx(0.01)  # type: ignore[union-attr]


def test_load_that_comes_and_goes_makes_a_saving_uncertain() -> None:
    """A placement that is good for the burst in one part and bad for all others."""
    _, forecast, served = loaded(HOT)
    usual, burst = [20.0, 20.0, 10.0, 10.0, 10.0, 10.0, 20.0, 20.0], [900.0, 900.0, 10.0, 10.0, 10.0, 10.0, 20.0, 20.0]
    wanted = Placement(np.array([[0, 4, 2, 3, 1, 5, 6, 7]]), served.offsets, 8)

    def under(*rows: list[float]) -> Saving:
        parts = [WindowPart(10, 10 * np.array([each]), 0.1, []) for each in rows]
        load_LE = np.sum([part.load_LE for part in parts], axis=0)
        found = forecast.plan(load_LE, served, wanted, parts=parts).saving
        assert found is not None
        return found

    assert under(burst, burst, burst, burst).noise == 0.0
    torn = under(usual, usual, burst, usual)
    assert 0 < torn.rows < torn.noise
    assert under(usual, usual).rows < 0, "a loss is a loss"


def test_the_same_placement_saves_nothing() -> None:
    parts, forecast, served = loaded(HOT)
    saving = forecast.plan(parts[0].load_LE, served, served, parts=parts).saving
    assert saving is not None
    assert (saving.rows, saving.share, saving.noise) == (0.0, 0.0, 0.0)
    assert forecast.plan(parts[0].load_LE, served, served).saving is None
    assert (
        saving_of(
            [WindowPart(1, np.zeros((1, 2)), 0.0, [])],
            [Slots(np.zeros((1, 2)), (0, 1, 2))] * 1,
            [Slots(np.zeros((1, 2)), (0, 1, 2))],
        ).share
        == 0.0
    )
