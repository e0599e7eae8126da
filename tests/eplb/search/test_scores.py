"""The definitions of balance, on numbers one can do in the head."""

from __future__ import annotations

import numpy as np
import pytest

from moe_serve.eplb.placement import Placement
from moe_serve.eplb.search.scores import all_scores, mean_of_ratios, rank_loads

LOADS_LR = np.array([[1.0, 3.0], [4.0, 4.0]])  # max / mean: 1.5 and 1


def test_each_definition_by_hand() -> None:
    assert all_scores(LOADS_LR) == {
        "ratio_of_sums": pytest.approx((2 + 4) / (3 + 4)),
        "mean_of_ratios": pytest.approx((2 / 3 + 1) / 2),
        "mean_excess": pytest.approx(0.25),
        "peak_to_average_p50": pytest.approx(1.25),
        "peak_to_average_p95": pytest.approx(1.475),
        "peak_to_average_max": pytest.approx(1.5),
    }


def test_layers_without_load_count_as_balanced() -> None:
    assert mean_of_ratios(np.array([[0.0, 0.0], [1.0, 3.0]])) == pytest.approx((1 + 2 / 3) / 2)
    assert all_scores(np.zeros((2, 3)))["ratio_of_sums"] == 1.0


def test_copies_share_evenly_unless_told_otherwise() -> None:
    placement = Placement(np.array([[0, 1, 0]]), (0, 2, 2, 3), 2)
    load_LE = np.array([[6.0, 2.0]])
    assert rank_loads(load_LE, placement).tolist() == [[5.0, 0.0, 3.0]]
    assert rank_loads(load_LE, placement, np.array([[0.5 / 1.5, 1.0, 1 / 1.5]])).tolist() == [[4.0, 0.0, 4.0]]
    steps = np.stack([load_LE, 2 * load_LE])
    assert rank_loads(steps, placement).tolist() == [[[5.0, 0.0, 3.0]], [[10.0, 0.0, 6.0]]]
