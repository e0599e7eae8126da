"""How many copies each expert gets, by marginal gain, with hysteresis; all layers at once.

The next copy goes to the expert whose copies carry most: with a threshold t, an expert of load w gets ceil(w / t)
copies, and t is searched so that the copies fill the slots. This equals handing copies out one by one.
"""

from __future__ import annotations

import numpy as np

from moe_serve.eplb.placement import Ints
from moe_serve.eplb.policies.base import Floats

SEARCH_STEPS = 30


def copies_by_gain(
    load_LE: Floats,
    slots: int,
    most: int,
    *,
    current_LE: Ints | None = None,
    hysteresis: float | Floats = 1.0,
    heavy_L1: Floats | None = None,
) -> Ints:
    """int64 (L, E), summing to `slots` in each layer, each in [1, most].

    With `current_LE`, an expert keeps its number of copies while each carries between t / hysteresis and
    t x hysteresis (but not more than `heavy_L1`, above which a copy alone would set the pace).
    """
    high = load_LE.max(axis=1, keepdims=True) * 2 * hysteresis  # too few copies
    low = load_LE.sum(axis=1, keepdims=True) / (8 * slots)  # too many, or as many as `most` allows
    for _ in range(SEARCH_STEPS):
        middle = np.sqrt(low * high)
        too_many = (
            _copies_at(middle, load_LE, most, current_LE, hysteresis, heavy_L1).sum(axis=1, keepdims=True) > slots
        )
        low, high = np.where(too_many, middle, low), np.where(too_many, high, middle)
    copies_LE = _copies_at(high, load_LE, most, current_LE, hysteresis, heavy_L1)
    return _hand_out_rest(copies_LE, load_LE, slots, most)


def _copies_at(
    threshold_L1: Floats,
    load_LE: Floats,
    most: int,
    current_LE: Ints | None,
    hysteresis: float | Floats,
    heavy_L1: Floats | None,
) -> Floats:
    if current_LE is None:
        return np.clip(np.ceil(load_LE / threshold_L1), 1, most)
    upper_L1 = threshold_L1 * hysteresis
    if heavy_L1 is not None:
        upper_L1 = np.maximum(threshold_L1, np.minimum(upper_L1, heavy_L1))
    fewest, largest = np.ceil(load_LE / upper_L1), np.ceil(load_LE * hysteresis / threshold_L1)
    return np.clip(np.clip(current_LE, fewest, largest), 1, most)


def _hand_out_rest(copies_LE: Floats, load_LE: Floats, slots: int, most: int) -> Ints:
    """Ties at the threshold, and experts without load: one more copy each to the largest shares until all are used."""
    rest_L = (slots - copies_LE.sum(axis=1)).astype(np.int64)
    while rest_L.max() > 0:
        share_LE = np.where(copies_LE < most, load_LE / copies_LE, -1.0)
        order = np.argsort(-share_LE, axis=1, kind="stable")
        given_L = np.minimum(rest_L, np.count_nonzero(share_LE >= 0, axis=1))
        np.put_along_axis(
            copies_LE,
            order,
            np.take_along_axis(copies_LE, order, axis=1) + (np.arange(load_LE.shape[1]) < given_L[:, None]),
            axis=1,
        )
        rest_L = rest_L - given_L
    return copies_LE.astype(np.int64)


def other_copies(copies_LE: Ints, most: int, tries: int) -> tuple[Ints, Ints]:
    """Distributions in which one copy went from one expert to another: (copies int64 (X, E), layer int64 (X,)).

    At most `tries` of each layer; all there are, or else a fixed selection.
    """
    tried, layers = [], []
    generator = np.random.default_rng(0)
    for layer, copies_E in enumerate(copies_LE):
        giver, taker = np.nonzero((copies_E > 1)[:, None] & (copies_E < most))
        pairs = np.flatnonzero(giver != taker)
        if len(pairs) > tries:
            pairs = generator.choice(pairs, tries, replace=False)
        changed = np.repeat(copies_E[None], len(pairs), axis=0)
        changed[np.arange(len(pairs)), giver[pairs]] -= 1
        changed[np.arange(len(pairs)), taker[pairs]] += 1
        tried.append(changed)
        layers.append(np.full(len(pairs), layer, dtype=np.int64))
    return np.concatenate(tried), np.concatenate(layers)
