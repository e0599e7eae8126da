"""Placement: which physical expert slot holds which logical expert, and which rank owns the slot. numpy only.

L layers, E logical experts, P physical slots. Slots of one rank are contiguous: rank r owns
`range(offsets[r], offsets[r + 1])`, in the same order in every layer. Ranks may own different numbers of slots.
Several slots may hold the same expert: its copies. Files of placements are read in `placement_file.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_serve.base.topology import split_range

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Placement:
    """`physical_to_logical_LP` int64 (L, P); `offsets` has one entry per rank plus one, from 0 to P."""

    physical_to_logical_LP: Ints
    offsets: tuple[int, ...]
    num_logical: int

    @property
    def num_layers(self) -> int:
        return int(self.physical_to_logical_LP.shape[0])

    @property
    def num_physical(self) -> int:
        return int(self.physical_to_logical_LP.shape[1])

    @property
    def num_redundant(self) -> int:
        """Slots of a layer beyond one per expert."""
        return self.num_physical - self.num_logical

    @property
    def num_ranks(self) -> int:
        return len(self.offsets) - 1

    def slots_of(self, rank: int) -> range:
        """Physical slots a rank owns."""
        return range(self.offsets[rank], self.offsets[rank + 1])

    def rank_of_slot(self) -> Ints:
        """int64 (P,): the owning rank of each slot."""
        return np.repeat(np.arange(self.num_ranks, dtype=np.int64), np.diff(self.offsets))

    def logical_of(self, layer: int, rank: int) -> Ints:
        """Logical experts a rank holds in a layer, in slot order."""
        slots = self.slots_of(rank)
        return self.physical_to_logical_LP[layer, slots.start : slots.stop]

    def first_replica(self, layer: int) -> Ints:
        """int64 (E,): the lowest slot that holds each logical expert."""
        row = self.physical_to_logical_LP[layer]
        slots = np.full(self.num_logical, -1, dtype=np.int64)
        slots[row[::-1]] = np.arange(self.num_physical - 1, -1, -1)
        return slots

    def copies(self) -> Ints:
        """int64 (L, E): how many slots hold each expert."""
        layers, experts = self.num_layers, self.num_logical
        flat = self.physical_to_logical_LP + np.arange(layers)[:, None] * experts
        return np.bincount(flat.ravel(), minlength=layers * experts).reshape(layers, experts).astype(np.int64)

    def logical_to_physical(self) -> Ints:
        """int64 (L, E, C): the slots of each expert, lowest first, then -1; C is the largest number of copies."""
        layers, slots = self.physical_to_logical_LP.shape
        counts = self.copies()
        order = np.argsort(self.physical_to_logical_LP, axis=1, kind="stable")
        experts = np.take_along_axis(self.physical_to_logical_LP, order, axis=1)
        starts = np.cumsum(counts, axis=1) - counts
        nth = np.arange(slots) - np.take_along_axis(starts, experts, axis=1)
        table = np.full((layers, self.num_logical, int(counts.max(initial=1))), -1, dtype=np.int64)
        table[np.arange(layers)[:, None], experts, nth] = order
        return table

    def of_layers(self, layers: Sequence[int]) -> Placement:
        """Some layers of it, in this order."""
        return Placement(self.physical_to_logical_LP[list(layers)], self.offsets, self.num_logical)

    def holdings(self) -> Ints:
        """int64 (L, P): one number for each (layer, rank, expert), so that equal numbers are copies on one rank."""
        layers = np.arange(self.num_layers, dtype=np.int64)[:, None]
        return (layers * self.num_ranks + self.rank_of_slot()) * self.num_logical + self.physical_to_logical_LP

    def num_duplicates(self) -> int:
        """Slots, over all layers, whose expert an earlier slot of the same rank already holds."""
        return self.physical_to_logical_LP.size - len(np.unique(self.holdings()))

    def check(self) -> None:
        """Raise ValueError unless every slot is owned once and every logical expert is present in every layer."""
        if self.offsets[0] != 0 or self.offsets[-1] != self.num_physical or np.any(np.diff(self.offsets) < 0):
            raise ValueError(f"slot offsets {self.offsets} do not cover {self.num_physical} slots")
        table = self.physical_to_logical_LP
        if table.size and (table.min() < 0 or table.max() >= self.num_logical):
            raise ValueError(f"a slot holds an expert outside [0, {self.num_logical})")
        for layer, row in enumerate(table):
            missing = np.setdiff1d(np.arange(self.num_logical), row)
            if missing.size:
                raise ValueError(f"layer {layer} holds no copy of experts {missing.tolist()}")


@dataclass(frozen=True, slots=True)
class Moves:
    """Slots whose expert their rank did not hold before; entry i is `layer[i]`, `slot[i]`, `expert[i]` (int64 each).

    A slot whose new expert was already somewhere on its rank is a local copy and not listed.
    """

    layer: Ints
    slot: Ints
    expert: Ints

    def __len__(self) -> int:
        return len(self.layer)


def moves(old: Placement, new: Placement) -> Moves:
    """What has to travel between ranks to get from `old` to `new`; ValueError unless both are of one shape."""
    _check_alike(old, new)
    layer, slot = np.nonzero(~np.isin(new.holdings(), old.holdings()))
    return Moves(layer.astype(np.int64), slot.astype(np.int64), new.physical_to_logical_LP[layer, slot])


def keep_slots(old: Placement, new: Placement) -> Placement:
    """`new` with the slots of each rank reordered, so that an expert that stays on its rank keeps its slot."""
    _check_alike(old, new)
    layers, slots = new.physical_to_logical_LP.shape
    kept_old, kept_new = _pair_equals(old.holdings().ravel(), new.holdings().ravel())
    row_old, row_new = old.physical_to_logical_LP.ravel(), new.physical_to_logical_LP.ravel()
    result = np.empty(layers * slots, dtype=np.int64)
    result[kept_old] = row_old[kept_old]
    free, rest = np.ones(layers * slots, dtype=np.bool_), np.ones(layers * slots, dtype=np.bool_)
    free[kept_old] = False
    rest[kept_new] = False
    # Both masks walk ranks in the same order, and every rank has as many free slots as experts left over.
    result[free] = row_new[rest]
    return Placement(result.reshape(layers, slots), new.offsets, new.num_logical)


def _pair_equals(left: Ints, right: Ints) -> tuple[Ints, Ints]:
    """Positions (i, j) with left[i] == right[j], each position used at most once, as many pairs as there are."""
    # The n-th occurrence of a key is made a key of its own, in the same way on both sides.
    most = max(len(left), len(right)) + 1
    _, from_left, from_right = np.intersect1d(
        left * most + _occurrence(left), right * most + _occurrence(right), assume_unique=True, return_indices=True
    )
    return from_left.astype(np.int64), from_right.astype(np.int64)


def _occurrence(keys: Ints) -> Ints:
    """How many equal keys stand before each."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    place = np.arange(len(keys))
    first = np.ones(len(keys), dtype=np.bool_)
    first[1:] = ordered[1:] != ordered[:-1]
    nth = np.empty_like(keys)
    nth[order] = place - np.maximum.accumulate(np.where(first, place, 0))
    return nth


def _check_alike(old: Placement, new: Placement) -> None:
    shapes = [(p.physical_to_logical_LP.shape, p.offsets, p.num_logical) for p in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"placements of different worlds: {shapes[0][0]} slots at {shapes[0][1]} for {shapes[0][2]} experts and "
            f"{shapes[1][0]} slots at {shapes[1][1]} for {shapes[1][2]} experts"
        )


def even_offsets(num_physical: int, num_ranks: int) -> tuple[int, ...]:
    """Slot offsets of ranks whose sizes differ by at most one, larger first."""
    return (*(split_range(num_physical, num_ranks, rank).start for rank in range(num_ranks)), num_physical)


def initial_placement(
    strategy: str, *, num_layers: int, num_experts: int, num_ranks: int, num_redundant: int = 0
) -> Placement:
    """One slot per expert, then `num_redundant` more slots for second copies of experts 0, 1, ... (ragged or not).

    `linear`: neighbours together; `round_robin`: slot i on rank i mod ranks.
    """
    if num_redundant < 0:
        raise ValueError(f"num_redundant must not be negative, not {num_redundant}")
    num_physical = num_experts + num_redundant
    if strategy == "linear":
        order = [list(split_range(num_physical, num_ranks, rank)) for rank in range(num_ranks)]
        shift = 0
    elif strategy == "round_robin":
        order = [list(range(rank, num_physical, num_ranks)) for rank in range(num_ranks)]
        # Without the shift a second copy would land on the rank of the first where the ranks divide the experts.
        shift = int(num_experts % num_ranks == 0)
    else:
        raise ValueError(f"unknown expert placement strategy {strategy!r}; known are linear, round_robin")
    slots = np.array([slot for of_rank in order for slot in of_rank], dtype=np.int64)
    row = np.where(slots < num_experts, slots, (slots - num_experts + shift) % num_experts)
    offsets = (0, *np.cumsum([len(of_rank) for of_rank in order]).tolist())
    placement = Placement(np.tile(row, (num_layers, 1)), offsets, num_experts)
    placement.check()
    return placement
