"""Packing weighted items into packs with a given number of places, heaviest item first (LPT), all rows at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moe_serve.eplb.placement import Ints


def pack(weight_Xn: npt.NDArray[np.floating], places: Ints) -> tuple[Ints, Ints]:
    """Give each of n items the lightest pack that still has a place: (pack, place in the pack), int64 (X, n) each.

    `places` int64 (packs,) sums to n. Ties go to the lower item and the lower pack.
    """
    rows, items = weight_Xn.shape
    if int(places.max(initial=0)) <= 1:  # one item a pack: as they come
        own = np.flatnonzero(places).astype(np.int64)
        return np.tile(own, (rows, 1)), np.zeros((rows, items), dtype=np.int64)
    row = np.arange(rows)
    order = np.argsort(-weight_Xn, axis=1, kind="stable")
    load = np.where(places > 0, np.zeros((rows, len(places)), dtype=weight_Xn.dtype), np.inf).astype(weight_Xn.dtype)
    used = np.zeros((rows, len(places)), dtype=np.int64)
    packs, nth = np.empty((rows, items), dtype=np.int64), np.empty((rows, items), dtype=np.int64)
    for item in order.T:
        lightest = load.argmin(axis=1)
        place = used[row, lightest]
        packs[row, item], nth[row, item] = lightest, place
        used[row, lightest] = place + 1
        grown = load[row, lightest] + weight_Xn[row, item]
        load[row, lightest] = np.where(place + 1 < places[lightest], grown, np.inf)
    return packs, nth
