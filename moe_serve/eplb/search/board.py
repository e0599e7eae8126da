"""A placement as a board of ranks x places, the form in which it is searched; all layers at once.

Ranks with fewer places than the largest have padding at their end. Padding and empty places hold the number E, which
weighs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_serve.eplb.placement import Ints, Placement
from moe_serve.eplb.policies.base import Floats, Problem


@dataclass(slots=True)
class Board:
    """`expert_LRs` int64 (L, R, s) is changed in place; `weight_LE` float64 (L, E + 1) is the load of one copy."""

    expert_LRs: Ints
    weight_LE: Floats
    places_R: Ints
    node_R: Ints

    @property
    def nobody(self) -> int:
        """The number of an empty place."""
        return int(self.weight_LE.shape[1]) - 1

    def weights(self) -> Floats:
        """float64 (L, R, s): the load on each place."""
        layers, ranks, places = self.expert_LRs.shape
        flat = self.expert_LRs.reshape(layers, ranks * places)
        return np.take_along_axis(self.weight_LE, flat, axis=1).reshape(layers, ranks, places)

    def loads(self) -> Floats:
        """float64 (L, R)."""
        loads: Floats = self.weights().sum(axis=2)
        return loads

    @property
    def ragged(self) -> bool:
        """Whether ranks have unequal numbers of places."""
        return int(self.places_R.min()) != int(self.places_R.max())

    def is_padding(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """bool (R, s)."""
        return np.arange(self.expert_LRs.shape[2]) >= self.places_R[:, None]

    def placement(self, problem: Problem) -> Placement:
        flat = self.expert_LRs.reshape(len(self.expert_LRs), -1)
        return Placement(np.ascontiguousarray(flat[:, ~self.is_padding().ravel()]), problem.offsets, self.nobody)


def board_of(table_LP: Ints, copy_load_LE: Floats, problem: Problem) -> Board:
    """A board from a table of slots, whose entries may be E for empty."""
    places_R = problem.slots_of_ranks
    layers, experts = copy_load_LE.shape
    expert_LRs = np.full((layers, problem.num_ranks, int(places_R.max())), experts, dtype=np.int64)
    board = Board(
        expert_LRs, np.concatenate([copy_load_LE, np.zeros((layers, 1))], axis=1), places_R, problem.node_of_rank
    )
    expert_LRs.reshape(layers, -1)[:, ~board.is_padding().ravel()] = table_LP
    return board
