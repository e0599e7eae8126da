"""How balanced a placement is under a load: one number per definition in use, each under its own name.

A layer's rank loads are the tokens each rank computes. `mean / max` is 1 when all ranks do the same work, and the
share of the time in which the average rank is busy while all wait for the slowest.
"""

from __future__ import annotations

import numpy as np

from moe_serve.eplb.placement import Placement
from moe_serve.eplb.policies.base import Floats


def slot_loads(load_LE: Floats, placement: Placement, shares_LP: Floats | None = None) -> Floats:
    """float64 (..., L, P): tokens of each slot; `load_LE` may have leading axes (steps).

    `shares_LP` says which part of its expert's tokens a slot gets; None: copies share evenly.
    """
    layers = np.arange(placement.num_layers)[:, None]
    if shares_LP is None:
        shares_LP = even_shares(placement)
    slots: Floats = load_LE[..., layers, placement.physical_to_logical_LP] * shares_LP
    return slots


def even_shares(placement: Placement) -> Floats:
    """float64 (L, P): one divided by the number of copies of the slot's expert."""
    return 1.0 / np.take_along_axis(placement.copies(), placement.physical_to_logical_LP, axis=1)


def rank_loads(load_LE: Floats, placement: Placement, shares_LP: Floats | None = None) -> Floats:
    """float64 (..., L, R): tokens each rank computes."""
    return sum_by_rank(slot_loads(load_LE, placement, shares_LP), placement.offsets)


def sum_by_rank(values_LP: Floats, offsets: tuple[int, ...]) -> Floats:
    """float64 (..., R): sums over the slots of each rank; 0 for a rank without slots."""
    starts = np.array(offsets[:-1])
    filled = np.diff(offsets) > 0
    sums = np.zeros((*values_LP.shape[:-1], len(starts)))
    sums[..., filled] = np.add.reduceat(values_LP, starts[filled], axis=-1)
    return sums


def mean_of_ratios(loads_LR: Floats) -> float:
    """Mean over layers (and steps) of mean / max rank load: what the command line calls balancedness."""
    return float(layer_balancedness(loads_LR).mean())


def ratio_of_sums(loads_LR: Floats) -> float:
    """Sum over layers of the mean rank load / sum of the largest: ideal time / time, if layers wait for each other."""
    largest = loads_LR.max(axis=-1).sum()
    return float(loads_LR.mean(axis=-1).sum() / largest) if largest else 1.0


def mean_excess(loads_LR: Floats) -> float:
    """Mean over layers of (max - mean) / mean rank load: 0 when balanced."""
    return float(peaks(loads_LR).mean() - 1.0)


def peak_to_average(loads_LR: Floats, quantile: float = 0.95) -> float:
    """Quantile over layers of max / mean rank load: 1 when balanced."""
    return float(np.quantile(peaks(loads_LR), quantile))


def layer_balancedness(loads_LR: Floats) -> Floats:
    """float64 (..., L): mean / max rank load of each layer; 1 for a layer without load."""
    balancedness: Floats = 1.0 / peaks(loads_LR)
    return balancedness


def peaks(loads_LR: Floats) -> Floats:
    """float64 (..., L): max / mean rank load of each layer; 1 for a layer without load."""
    mean = loads_LR.mean(axis=-1)
    ratios: Floats = np.divide(loads_LR.max(axis=-1), mean, out=np.ones_like(mean), where=mean > 0)
    return ratios


def all_scores(loads_LR: Floats) -> dict[str, float]:
    """Every definition under its name."""
    return {
        "ratio_of_sums": ratio_of_sums(loads_LR),
        "mean_of_ratios": mean_of_ratios(loads_LR),
        "mean_excess": mean_excess(loads_LR),
        "peak_to_average_p50": peak_to_average(loads_LR, 0.5),
        "peak_to_average_p95": peak_to_average(loads_LR, 0.95),
        "peak_to_average_max": peak_to_average(loads_LR, 1.0),
    }
