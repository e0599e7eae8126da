"""Local search: swaps of two experts between a heavy and a light rank, many pairs of ranks and all layers at once.

In a round the heaviest rank is paired with the lightest, the second heaviest with the second lightest and so on, and
each pair makes its best swap, if any is worth it. Rounds alternate between pairs on one node, whose swaps are cheap,
and pairs anywhere, and between different ways to pair. A swap never changes how many copies an expert has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_serve.eplb.placement import Ints
from moe_serve.eplb.policies.base import Floats
from moe_serve.eplb.search.board import Board

SHIFTS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Prices:
    """What a swap must bring, as shares of the mean rank load.

    `move`: largest rank load to be saved per slot moved. `travel`: how much better a swap must look for each expert it
    sends away from the rank that holds it now; `other_node` times that if none of its node does. `away`: the
    price of a copy, as a share of its load, on another node than its group's. `least`: the smallest gain of a swap.
    `enough`: a layer whose largest rank load is so close to the best there can be is left.
    """

    move: float
    travel: float
    other_node: float
    away: float
    least: float
    enough: float = 0.0


@dataclass(slots=True)
class Search:
    """What a search needs to know. `held_LRs`: who held what before; `home_LE`: the node each expert should be on.

    `home_LE` has a last column for an empty place.
    """

    board: Board
    prices: Prices
    held_LRs: Ints | None = None
    home_LE: Ints | None = None


@dataclass(slots=True)
class Pairs:
    """Pairs of ranks that may swap (X, over all layers): who, what they hold, half the difference of their loads."""

    layer: Ints
    heavy: Ints
    light: Ints
    given_Xs: Ints
    taken_Xs: Ints
    half: Floats
    mean: Floats


def exchange(search: Search, *, rounds: int) -> None:
    """Swap on the board until nothing gains, at most `rounds` times."""
    board = search.board
    if min(board.expert_LRs.shape[1:]) < 2:  # one place a rank: a swap only renames ranks
        return
    ways = _ways(board.node_R)
    idle_L = np.zeros(len(board.expert_LRs), dtype=np.int64)
    weight_LRs = board.weights()
    mean_L = weight_LRs.sum(axis=2).mean(axis=1)
    heaviest_L = weight_LRs.max(axis=(1, 2))  # swaps leave it as it is
    for turn in range(rounds):
        layers = np.flatnonzero(idle_L < len(ways))
        if not len(layers):
            break
        load_LR = weight_LRs[layers].sum(axis=2)
        limit_L = _limits(load_LR, heaviest_L[layers], mean_L[layers], search.prices.move)
        pairs = _pairs_above(board, layers, load_LR, limit_L, mean_L[layers], ways[turn % len(ways)])
        swapped = _swap(search, weight_LRs, pairs)
        idle_L[layers] += 1
        idle_L[swapped] = 0
        idle_L[layers[load_LR.max(axis=1) <= limit_L + search.prices.enough * mean_L[layers]]] = len(ways)


def _ways(node_R: Ints) -> list[tuple[bool, int]]:
    """(within nodes, shift) of each kind of round."""
    sizes = np.bincount(node_R)
    if len(sizes) > 1 and sizes.min() == sizes.max() and sizes[0] > 1:
        return [(inside, shift) for shift in SHIFTS for inside in (True, False)]
    return [(False, shift) for shift in SHIFTS]


def _limits(load_LR: Floats, heaviest_copy_L: Floats, mean_L: Floats, price: float) -> Floats:
    """float64 (L,): the rank load above which ranks are worth relieving, at two moves a rank."""
    falling_LR = -np.sort(-load_LR, axis=1)
    floor_L1 = np.maximum(mean_L, heaviest_copy_L)[:, None]
    peak_LR = np.maximum(falling_LR, floor_L1)  # what is left after relieving the first 0, 1, 2, ... ranks
    cost_LR = peak_LR + 2 * price * mean_L[:, None] * np.arange(load_LR.shape[1])
    limits: Floats = np.take_along_axis(peak_LR, cost_LR.argmin(axis=1)[:, None], axis=1)[:, 0]
    return limits * (1 + 1e-9)


def _pairs_above(
    board: Board, layers: Ints, load_LR: Floats, limit_L: Floats, mean_L: Floats, way: tuple[bool, int]
) -> Pairs:
    """The pairs whose heavy rank is above the limit of its layer; every rank is in at most one pair."""
    inside, shift = way
    ranks = load_LR.shape[1]
    nodes = int(board.node_R[-1]) + 1 if inside else 1
    order_LNr = load_LR.reshape(len(layers), nodes, ranks // nodes).argsort(axis=2, kind="stable")
    half = ranks // nodes // 2
    first_N1 = np.arange(nodes)[:, None] * (ranks // nodes)
    heavy_LH = (order_LNr[:, :, ::-1][:, :, :half] + first_N1).reshape(len(layers), -1)
    light_LH = (np.roll(order_LNr[:, :, :half], shift % half, axis=2) + first_N1).reshape(len(layers), -1)
    above_LH = np.take_along_axis(load_LR, heavy_LH, axis=1)
    half_LH = (above_LH - np.take_along_axis(load_LR, light_LH, axis=1)) / 2
    row, at = np.nonzero((above_LH > limit_L[:, None]) & (half_LH > 0))
    layer, heavy, light = layers[row], heavy_LH[row, at], light_LH[row, at]
    return Pairs(
        layer,
        heavy,
        light,
        board.expert_LRs[layer, heavy],
        board.expert_LRs[layer, light],
        half_LH[row, at],
        mean_L[row],
    )


def _swap(search: Search, weight_LRs: Floats, pairs: Pairs) -> Ints:
    """Make each pair's best swap if it is worth it; the layers in which any was made."""
    board = search.board
    if not len(pairs.layer):
        return pairs.layer
    # How far above the middle of the two the heavier of both would end up, and what the swap costs beside.
    loss_Xs = weight_LRs[pairs.layer, pairs.heavy] - pairs.half[:, None]
    gain_Xs = weight_LRs[pairs.layer, pairs.light]
    if board.ragged:
        padding = board.is_padding()
        loss_Xs[padding[pairs.heavy]] = np.inf
        gain_Xs[padding[pairs.light]] = -np.inf
    off_Xss = np.abs(loss_Xs[:, :, None] - gain_Xs[:, None, :])
    for fee_given, fee_taken in _fees(search, pairs):
        off_Xss += fee_given[:, :, None]
        off_Xss += fee_taken[:, None, :]
    give, take = _best_legal(pairs, off_Xss)
    saved = pairs.half - off_Xss[np.arange(len(give)), give, take]
    good = np.flatnonzero(saved > search.prices.least * pairs.mean)
    here = pairs.layer[good], pairs.heavy[good], give[good]
    there = pairs.layer[good], pairs.light[good], take[good]
    for array in (board.expert_LRs, weight_LRs):
        array[here], array[there] = array[there], array[here]
    return pairs.layer[good]


def _best_legal(pairs: Pairs, off_Xss: Floats) -> tuple[Ints, Ints]:
    """Places (given, taken) of the lowest entry of each pair that brings no rank a second copy of an expert."""
    places = off_Xss.shape[2]
    row = np.arange(len(off_Xss))
    give, take = np.divmod(off_Xss.reshape(len(row), -1).argmin(axis=1), places)
    given_X1, taken_X1 = pairs.given_Xs[row, give][:, None], pairs.taken_Xs[row, take][:, None]
    wrong = np.flatnonzero(((pairs.taken_Xs == given_X1) | (pairs.given_Xs == taken_X1)).any(axis=1))
    if len(wrong):  # look at all places only where the best is forbidden
        same_Xss = pairs.given_Xs[wrong, :, None] == pairs.taken_Xs[wrong, None, :]
        off_Xss[wrong] += np.where(same_Xss.any(axis=2)[:, :, None] | same_Xss.any(axis=1)[:, None, :], np.inf, 0.0)
        give[wrong], take[wrong] = np.divmod(off_Xss[wrong].reshape(len(wrong), -1).argmin(axis=1), places)
    return give, take


def _fees(search: Search, pairs: Pairs) -> list[tuple[Floats, Floats]]:
    """What it costs to give each expert of the heavy rank and to take each of the light one, (X, s) each."""
    return [fees for fees in (_travel_fees(search, pairs), _away_fees(search, pairs)) if fees is not None]


def _travel_fees(search: Search, pairs: Pairs) -> tuple[Floats, Floats] | None:
    """Leaving the rank that held it costs, coming back earns."""
    if search.held_LRs is None:
        return None
    held_heavy, held_light = search.held_LRs[pairs.layer, pairs.heavy], search.held_LRs[pairs.layer, pairs.light]
    node_R = search.board.node_R
    times = np.where(node_R[pairs.heavy] == node_R[pairs.light], 1.0, search.prices.other_node)
    price_X1 = (search.prices.travel * pairs.mean * times)[:, None]
    return (
        price_X1 * (_among(pairs.given_Xs, held_heavy) - _among(pairs.given_Xs, held_light)),
        price_X1 * (_among(pairs.taken_Xs, held_light) - _among(pairs.taken_Xs, held_heavy)),
    )


def _among(expert_Xs: Ints, held_Xs: Ints) -> Floats:
    """1.0 where the expert is one of those held, else 0.0."""
    among: Floats = (expert_Xs[:, :, None] == held_Xs[:, None, :]).any(axis=2).astype(np.float64)
    return among


def _away_fees(search: Search, pairs: Pairs) -> tuple[Floats, Floats] | None:
    """Leaving the node of the expert's group costs, coming back earns, in proportion to the tokens."""
    if search.home_LE is None:
        return None
    fees = []
    for expert_Xs, here, there in (
        (pairs.given_Xs, pairs.heavy, pairs.light),
        (pairs.taken_Xs, pairs.light, pairs.heavy),
    ):
        home_Xs = search.home_LE[pairs.layer[:, None], expert_Xs]
        node_here, node_there = (search.board.node_R[rank][:, None] for rank in (here, there))
        further_Xs = (home_Xs != node_there).astype(np.float64) - (home_Xs != node_here)
        fees.append(search.prices.away * further_Xs * search.board.weight_LE[pairs.layer[:, None], expert_Xs])
    return fees[0], fees[1]
