"""The default policy: balance as well as the published algorithm and move a tenth of what it moves.

Without a present placement: copies by marginal gain, dealt heaviest first to the lightest rank, then swaps. With one:
change the number of copies only where loads changed much, then relieve heavy ranks by swaps while a swap gains more
than it costs. A layer keeps what it has unless it gains; a layer that swaps cannot mend is dealt anew. Copies of an
expert never share a rank. Nodes and expert groups are prices, not walls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_serve.eplb.placement import Bools, Ints, Placement, keep_slots
from moe_serve.eplb.policies.base import Floats, Problem
from moe_serve.eplb.search.board import board_of
from moe_serve.eplb.search.deal import deal
from moe_serve.eplb.search.exchange import Prices, Search, exchange
from moe_serve.eplb.search.packing import pack
from moe_serve.eplb.search.relabel import relabel_ranks
from moe_serve.eplb.search.repair import fit_copies, part_copies
from moe_serve.eplb.search.replicas import copies_by_gain, other_copies
from moe_serve.eplb.search.scores import peaks, rank_loads

FROM_NOTHING = Prices(move=0.0, travel=0.0, other_node=1.0, away=0.1, least=1e-4, enough=5e-4)
TO_CHANGE = Prices(move=0.0015, travel=0.005, other_node=2.0, away=0.1, least=0.001)

PASSES = 6
POOR = 0.01  # a largest rank load so much above what is surely needed, as a share of the mean, is thought about
MORE_THOUGHTS = 4
SMALL_WORLD = 128  # slots of a layer
LEAST_PRICE_OF_GROUPS = 0.004  # largest rank load, as a share of the mean, that groups on their nodes may cost


@dataclass(frozen=True, slots=True)
class Stickiness:
    """How reluctant to move. Loads in shares of the mean rank load."""

    prices: Prices = TO_CHANGE
    hysteresis: float = 1.3
    """Copies stay while each carries between 1 / this and this times the threshold."""
    tight: float = 1.05
    """The same where the heaviest copy sets the pace, because there are too few slots for the hottest experts."""
    heavy: float = 0.75
    """A copy above this load gets no such tolerance: it would set the pace alone."""
    least_gain: float = 0.001
    """A layer keeps its placement unless the largest rank load falls by this, beside the price of the moves."""
    hopeless: float = 0.1
    """A layer is dealt anew if that lowers the largest rank load by this share of it more than swaps could."""
    rounds: int = 40


def sticky(problem: Problem, stickiness: Stickiness = Stickiness()) -> Placement:  # noqa: B008 (frozen)
    """A placement without two copies on one rank, close to the present one if there is one."""
    load_LE = _without_zeros(problem.load_LE)
    current = problem.current or _deal_anew(problem, load_LE)
    if problem.current is None and problem.num_physical > SMALL_WORLD:
        return current
    table_LP = current.physical_to_logical_LP.copy()
    changed_L = np.arange(problem.num_layers)
    for _ in range(PASSES):  # until a pass changes nothing, so that the same load again changes nothing
        part = Placement(table_LP[changed_L], problem.offsets, problem.num_experts)
        better = _improve(_part(problem, changed_L, part), load_LE[changed_L], stickiness)
        differs_L = (better.physical_to_logical_LP != table_LP[changed_L]).any(axis=1)
        table_LP[changed_L] = better.physical_to_logical_LP
        changed_L = changed_L[differs_L]
        if not len(changed_L):
            break
    return keep_slots(current, Placement(table_LP, problem.offsets, problem.num_experts))


def _part(problem: Problem, layer_X: Ints, current: Placement | None = None) -> Problem:
    """The problem of some layers."""
    load_XE = problem.load_LE[layer_X]
    if not load_XE.any():  # a problem needs some load somewhere
        load_XE = np.ones_like(load_XE)
    return Problem(load_XE, problem.offsets, problem.node_sizes, problem.num_groups, current)


def _improve(problem: Problem, load_LE: Floats, stickiness: Stickiness) -> Placement:
    """One pass over the present placement; layers that would not gain keep it."""
    assert problem.current is not None
    current = problem.current
    mended = _mend(problem, current, load_LE, stickiness)
    mended = _redeal_hopeless(problem, mended, load_LE, stickiness)
    keep_L = ~_gains(current, mended, load_LE, stickiness.least_gain)
    table_LP = np.where(keep_L[:, None], current.physical_to_logical_LP, mended.physical_to_logical_LP)
    return Placement(table_LP, problem.offsets, problem.num_experts)


def _without_zeros(load_LE: Floats) -> Floats:
    """Experts nobody chose weigh a trifle, so that they spread evenly too; a layer without load is even."""
    mean_L1 = load_LE.mean(axis=1, keepdims=True)
    return np.where(mean_L1 > 0, load_LE + 1e-6 * mean_L1, 1.0)


def _deal_anew(problem: Problem, load_LE: Floats) -> Placement:
    copies_LE = copies_by_gain(load_LE, problem.num_physical, _holders(problem))
    home_LE = _homes(problem, load_LE, None)
    placement = _second_thoughts(problem, load_LE, copies_LE, _deal_copies(problem, load_LE, copies_LE, home_LE))
    if home_LE is None:
        return placement
    return _ungroup_poor(problem, load_LE, placement, _least_peaks(problem, load_LE, copies_LE))


def _deal_copies(problem: Problem, load_LE: Floats, copies_LE: Ints, home_LE: Ints | None) -> Placement:
    """Deal, part copies, swap. There may be any number of layers."""
    board = board_of(deal(problem, load_LE, copies_LE, home_LE, FROM_NOTHING.away), load_LE / copies_LE, problem)
    part_copies(board)
    exchange(Search(board, FROM_NOTHING, home_LE=home_LE), rounds=10)
    if home_LE is not None:
        exchange(Search(board, FROM_NOTHING), rounds=6)  # nodes decide between equals only
    return board.placement(problem)


def _holders(problem: Problem) -> int:
    """Ranks that have a slot: an expert can have so many copies."""
    return int(np.count_nonzero(problem.slots_of_ranks))


def _second_thoughts(problem: Problem, load_LE: Floats, copies_LE: Ints, placement: Placement) -> Placement:
    """In small worlds, where one copy matters: try giving a copy of one expert to another in the poor layers."""
    table_LP = placement.physical_to_logical_LP.copy()
    peak_L = peaks(rank_loads(load_LE, placement))
    for _ in range(MORE_THOUGHTS):
        poor_L = np.flatnonzero(peak_L > _least_peaks(problem, load_LE, copies_LE) + POOR)
        tries = _number_of_tries(problem, len(poor_L))
        if tries < 2:
            break
        tried_XE, layer_X = other_copies(copies_LE[poor_L], _holders(problem), tries)
        if not len(layer_X):
            break
        layer_X = poor_L[layer_X]
        found = _deal_copies(problem, load_LE[layer_X], tried_XE, None)
        found_peak_X = peaks(rank_loads(load_LE[layer_X], found))
        before_L = peak_L.copy()
        for x in np.argsort(-found_peak_X, kind="stable"):  # the best of each layer comes last
            layer = layer_X[x]
            if found_peak_X[x] < before_L[layer] - POOR / 10:
                table_LP[layer], peak_L[layer] = found.physical_to_logical_LP[x], found_peak_X[x]
                copies_LE[layer] = tried_XE[x]
        if not (peak_L < before_L).any():
            break
    return Placement(table_LP, problem.offsets, problem.num_experts)


def _number_of_tries(problem: Problem, layers: int) -> int:
    """How many other distributions of copies of each of `layers` layers can be tried in a few milliseconds."""
    slots, ranks = problem.num_physical, problem.num_ranks
    if slots > SMALL_WORLD or not layers:
        return 0
    return min(64, int(5e5 / (layers * slots * max(ranks, int(problem.slots_of_ranks.max())))))


def _ungroup_poor(problem: Problem, load_LE: Floats, placement: Placement, least_L: Floats) -> Placement:
    """Deal those layers again, without regard to groups, in which keeping them together cost balance."""
    peak_L = peaks(rank_loads(load_LE, placement))
    poor_L = np.flatnonzero(peak_L > least_L + LEAST_PRICE_OF_GROUPS)
    if not len(poor_L):
        return placement
    part = Problem(load_LE[poor_L], problem.offsets, problem.node_sizes)
    anew = _deal_anew(part, load_LE[poor_L])
    better = peaks(rank_loads(part.load_LE, anew)) < peak_L[poor_L] - LEAST_PRICE_OF_GROUPS
    table_LP = placement.physical_to_logical_LP.copy()
    table_LP[poor_L[better]] = anew.physical_to_logical_LP[better]
    return Placement(table_LP, problem.offsets, problem.num_experts)


def _mend(problem: Problem, current: Placement, load_LE: Floats, stickiness: Stickiness) -> Placement:
    """The present placement with a few copies changed and a few experts swapped."""
    had_LE = current.copies()
    mean_L1 = load_LE.sum(axis=1, keepdims=True) / problem.num_ranks
    copies_LE = copies_by_gain(
        load_LE,
        problem.num_physical,
        _holders(problem),
        current_LE=had_LE,
        hysteresis=_hysteresis(problem, load_LE, had_LE, stickiness),
        heavy_L1=stickiness.heavy * mean_L1,
    )
    board = board_of(current.physical_to_logical_LP, load_LE / copies_LE, problem)
    held_LRs = board.expert_LRs.copy()
    fit_copies(board, had_LE - copies_LE)
    part_copies(board)
    home_LE = _homes(problem, load_LE, current)
    exchange(Search(board, stickiness.prices, held_LRs, home_LE), rounds=stickiness.rounds)
    return board.placement(problem)


def _hysteresis(problem: Problem, load_LE: Floats, had_LE: Ints, stickiness: Stickiness) -> Floats:
    """float64 (L, 1)."""
    hysteresis_L1 = np.full((len(load_LE), 1), stickiness.hysteresis)
    heavy_L = np.flatnonzero(_least_peaks(problem, load_LE, had_LE) > 1)
    if len(heavy_L):
        copies_LE = copies_by_gain(load_LE[heavy_L], problem.num_physical, _holders(problem))
        hysteresis_L1[heavy_L[_least_peaks(problem, load_LE[heavy_L], copies_LE) > 1]] = stickiness.tight
    return hysteresis_L1


def _redeal_hopeless(problem: Problem, mended: Placement, load_LE: Floats, stickiness: Stickiness) -> Placement:
    """Deal those layers anew in which swaps left much to gain, and give the new ranks the numbers that fit best."""
    assert problem.current is not None
    peak_L = peaks(rank_loads(load_LE, mended))
    if peak_L.max() <= 1 + stickiness.hopeless:
        return mended
    copies_LE = copies_by_gain(load_LE, problem.num_physical, _holders(problem))
    least_L = _least_peaks(problem, load_LE, copies_LE)
    poor_L = np.flatnonzero(peak_L > least_L * (1 + stickiness.hopeless))
    if not len(poor_L):
        return mended
    part = Problem(load_LE[poor_L], problem.offsets, problem.node_sizes, problem.num_groups)
    anew = _deal_anew(part, load_LE[poor_L])
    better = peaks(rank_loads(part.load_LE, anew)) * (1 + stickiness.hopeless) < peak_L[poor_L]
    if not better.any():
        return mended
    table_LP = mended.physical_to_logical_LP.copy()
    held_LP = problem.current.physical_to_logical_LP
    for layer, row in zip(poor_L[better], anew.physical_to_logical_LP[better], strict=True):
        table_LP[layer] = relabel_ranks(held_LP[layer], row, problem)
    return Placement(table_LP, problem.offsets, problem.num_experts)


def _least_peaks(problem: Problem, load_LE: Floats, copies_LE: Ints) -> Floats:
    """float64 (L,): max / mean rank load that no placement of these copies can be below."""
    heaviest_L: Floats = (load_LE / copies_LE).max(axis=1) * problem.num_ranks / load_LE.sum(axis=1)
    return np.maximum(heaviest_L, 1.0)


def _gains(current: Placement, mended: Placement, load_LE: Floats, least: float) -> Bools:
    """bool (L,): whether a layer's change pays, or parts copies that shared a rank."""
    before_L, after_L = (peaks(rank_loads(load_LE, placement)) for placement in (current, mended))
    had_L, left_L = _duplicates(current), _duplicates(mended)
    gains: Bools = (before_L - after_L > least) | (had_L > left_L)
    return gains


def _duplicates(placement: Placement) -> Ints:
    """int64 (L,): slots whose expert another slot of their rank holds already."""
    ordered_LP = np.sort(placement.holdings(), axis=1)
    duplicates: Ints = (ordered_LP[:, 1:] == ordered_LP[:, :-1]).sum(axis=1)
    return duplicates


def _homes(problem: Problem, load_LE: Floats, current: Placement | None) -> Ints | None:
    """int64 (L, E + 1): the node each expert's group should be on, -1 for nobody; None if groups do not matter."""
    nodes, groups = problem.num_nodes, problem.num_groups
    uneven = max(problem.node_sizes) - min(problem.node_sizes) > 1  # each node would get as many groups
    if nodes == 1 or groups == 1 or groups % nodes or uneven:
        return None
    size = problem.num_experts // groups
    weight_LG = load_LE.reshape(len(load_LE), groups, size).sum(axis=2)
    node_LG, _ = pack(weight_LG, np.full(nodes, groups // nodes))
    if current is not None:
        node_LG = _present_homes(problem, current, node_LG)
    home_LE = np.repeat(node_LG, size, axis=1)
    return np.concatenate([home_LE, np.full((len(load_LE), 1), -1)], axis=1)


def _present_homes(problem: Problem, current: Placement, node_LG: Ints) -> Ints:
    """For each group the node that has most of its slots; the given one where none has a clear majority."""
    groups, nodes, layers = problem.num_groups, problem.num_nodes, problem.num_layers
    group_LP = current.physical_to_logical_LP // (problem.num_experts // groups)
    node_P = problem.node_of_rank[current.rank_of_slot()]
    cell_LP = (np.arange(layers)[:, None] * groups + group_LP) * nodes + node_P
    slots_LGN = np.bincount(cell_LP.ravel(), minlength=layers * groups * nodes).reshape(layers, groups, nodes)
    clear_LG = 2 * slots_LGN.max(axis=2) > slots_LGN.sum(axis=2)
    return np.where(clear_LG, slots_LGN.argmax(axis=2), node_LG)
