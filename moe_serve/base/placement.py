"""Placement: which physical expert slot holds which logical expert, and which rank owns the slot. numpy only.

L layers, E logical experts, P physical slots. Slots of one rank are contiguous: rank r owns
`range(offsets[r], offsets[r + 1])`, in the same order in every layer. Ranks may own different numbers of slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_serve.base.topology import split_range

Ints = npt.NDArray[np.int64]


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


def initial_placement(strategy: str, *, num_layers: int, num_experts: int, num_ranks: int) -> Placement:
    """One slot per expert. `linear`: neighbours together; `round_robin`: expert e on rank e mod ranks; ragged or not."""
    if strategy == "linear":
        order = [list(split_range(num_experts, num_ranks, rank)) for rank in range(num_ranks)]
    elif strategy == "round_robin":
        order = [list(range(rank, num_experts, num_ranks)) for rank in range(num_ranks)]
    else:
        raise ValueError(f"unknown expert placement strategy {strategy!r}; known are linear, round_robin")
    row = np.array([expert for experts in order for expert in experts], dtype=np.int64)
    offsets = (0, *np.cumsum([len(experts) for experts in order]).tolist())
    placement = Placement(np.tile(row, (num_layers, 1)), offsets, num_experts)
    placement.check()
    return placement
