"""Small changes to a board: drop and add copies until their numbers fit, and part copies that share a rank."""

from __future__ import annotations

import numpy as np

from moe_serve.eplb.placement import Ints
from moe_serve.eplb.policies.base import Floats
from moe_serve.eplb.search.board import Board

TURNS = 32  # copies are added one at a time and layer, or several if there are more than this


def fit_copies(board: Board, surplus_LE: Ints) -> None:
    """Change the numbers of copies by -`surplus_LE` (each layer sums to 0): drop on heavy ranks, add on light ones."""
    _drop(board, np.maximum(surplus_LE, 0))
    _add(board, np.maximum(-surplus_LE, 0))


def _drop(board: Board, surplus_LE: Ints) -> None:
    """Empty the places on the heaviest ranks."""
    if not surplus_LE.any():
        return
    layers = len(surplus_LE)
    expert_Ln = board.expert_LRs.reshape(layers, -1)
    nth_Ln = _order_within_experts(expert_Ln, np.repeat(board.loads(), board.expert_LRs.shape[2], axis=1))
    allowed_LE1 = np.concatenate([surplus_LE, np.zeros((layers, 1), dtype=np.int64)], axis=1)
    expert_Ln[nth_Ln < np.take_along_axis(allowed_LE1, expert_Ln, axis=1)] = board.nobody


def _order_within_experts(expert_Ln: Ints, load_Ln: Floats) -> Ints:
    """int64 (L, n): 0 for the place of each expert on its heaviest rank, 1 for the next, and so on."""
    order = np.argsort(-load_Ln, axis=1, kind="stable")
    order = np.take_along_axis(
        order, np.argsort(np.take_along_axis(expert_Ln, order, axis=1), axis=1, kind="stable"), axis=1
    )
    ordered = np.take_along_axis(expert_Ln, order, axis=1)
    at = np.broadcast_to(np.arange(ordered.shape[1]), ordered.shape)
    first = np.ones(ordered.shape, dtype=np.bool_)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    nth = np.empty_like(order)
    np.put_along_axis(nth, order, at - np.maximum.accumulate(np.where(first, at, 0), axis=1), axis=1)
    return nth


def _add(board: Board, missing_LE: Ints) -> None:
    """Fill the empty places, heaviest copy first, each on the lightest rank that does not hold its expert."""
    missing_LE = missing_LE.copy()
    size = -(-int(missing_LE.sum(axis=1).max()) // TURNS)
    load_LR = board.loads()
    empty_LRs = (board.expert_LRs == board.nobody) & ~board.is_padding()
    places_LR = empty_LRs.sum(axis=2)
    while len(layer := np.flatnonzero(missing_LE.any(axis=1))):
        with_place_LR = places_LR[layer] > 0
        batch = int(min(size, with_place_LR.sum(axis=1).min(), np.count_nonzero(missing_LE[layer], axis=1).min()))
        weight_LE = np.where(missing_LE[layer] > 0, board.weight_LE[layer, :-1], -1.0)
        expert_Lb = weight_LE.argsort(axis=1)[:, ::-1][:, :batch]
        # A rank that holds the expert is the last resort; `part_copies` sorts that out.
        holds_LR = (board.expert_LRs[layer] == expert_Lb[:, :1, None]).any(axis=2)
        seen_LR = np.where(with_place_LR, load_LR[layer] + np.where(holds_LR, 1e30, 0.0), np.inf)
        rank_Lb = seen_LR.argsort(axis=1)[:, :batch]
        row = layer[:, None]
        place_Lb = empty_LRs[row, rank_Lb].argmax(axis=2)
        board.expert_LRs[row, rank_Lb, place_Lb] = expert_Lb
        empty_LRs[row, rank_Lb, place_Lb] = False
        places_LR[row, rank_Lb] -= 1
        load_LR[row, rank_Lb] += board.weight_LE[row, expert_Lb]
        missing_LE[row, expert_Lb] -= 1


def part_copies(board: Board) -> None:
    """Swap away every copy whose rank holds another of the same expert; deal a layer anew where no swap can."""
    for layer, rank, place in zip(*_doubles(board), strict=True):
        _part(board, int(layer), int(rank), int(place))
    for layer in np.unique(_doubles(board)[0]):
        _deal_apart(board, int(layer))


def _doubles(board: Board) -> tuple[Ints, Ints, Ints]:
    """(layer, rank, place) of every place whose expert an earlier place of the rank holds."""
    expert_LRs = np.where(board.expert_LRs == board.nobody, -1 - np.arange(board.expert_LRs.shape[2]), board.expert_LRs)
    order = expert_LRs.argsort(axis=2, kind="stable")
    ordered = np.take_along_axis(expert_LRs, order, axis=2)
    layer, rank, at = np.nonzero(ordered[:, :, 1:] == ordered[:, :, :-1])
    return layer, rank, order[layer, rank, at + 1]


def _part(board: Board, layer: int, rank: int, place: int) -> None:
    """Swap with the place elsewhere that leaves the heavier of both ranks lightest."""
    expert_Rs, weight_E = board.expert_LRs[layer], board.weight_LE[layer]
    expert = expert_Rs[rank, place]
    may_Rs = ~(expert_Rs == expert).any(axis=1)[:, None] & (expert_Rs != board.nobody)
    may_Rs &= ~np.isin(expert_Rs, expert_Rs[rank])
    if not may_Rs.any():
        return
    weight_Rs = weight_E[expert_Rs]
    load_R = weight_Rs.sum(axis=1)
    given = weight_E[expert] - weight_Rs
    worse_Rs = np.where(may_Rs, np.maximum(load_R[:, None] + given, load_R[rank] - given), np.inf)
    other, there = divmod(int(worse_Rs.argmin()), expert_Rs.shape[1])
    expert_Rs[rank, place], expert_Rs[other, there] = expert_Rs[other, there], expert


def _deal_apart(board: Board, layer: int) -> None:
    """Most copies first, each to a rank of its own with most places left: parts all copies if that can be done at all.

    (The constructive half of the Gale-Ryser theorem.)
    """
    copies_E = np.bincount(board.expert_LRs[layer].ravel(), minlength=board.nobody + 1)[: board.nobody]
    weight_E = board.weight_LE[layer, : board.nobody]
    left_R, load_R = board.places_R.copy(), np.zeros(len(board.places_R))
    dealt_Rs = np.full(board.expert_LRs.shape[1:], board.nobody)
    if copies_E.max() > np.count_nonzero(left_R):
        return
    for expert in np.lexsort((-weight_E, -copies_E)):
        ranks = np.lexsort((load_R, -left_R))[: copies_E[expert]]
        if not left_R[ranks].all():
            return
        dealt_Rs[ranks, board.places_R[ranks] - left_R[ranks]] = expert
        left_R[ranks] -= 1
        load_R[ranks] += weight_E[expert]
    board.expert_LRs[layer] = dealt_Rs
