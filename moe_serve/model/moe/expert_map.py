"""ExpertMap: logical expert ids -> physical slots, on the device. No other layer knows where experts live.

Which copy of an expert a row takes follows from a hash of the row (its request and position, see
worker/inputs.py), of layer, expert and source rank alone: not from the batch around it.

Shape letters: T rows, K top-k, E logical experts, C most copies of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from moe_serve.eplb.placement import Placement

_MIX_1, _MIX_2 = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64)
"""Odd multipliers of the golden ratio and of splitmix64 (Steele et al. 2014), as signed 64-bit integers."""


class ExpertMap(nn.Module):
    """One layer's map of one source rank. Without slots (experts cut by width) a slot is its expert.

    `slots_EC` int64 (E, C): the slots of an expert's copies. `shares_EC` float32 (E, C): cumulative shares of the rows
    that take each copy, the last copy's at least 1; places past the last copy repeat it. `salt` is the layer's and the
    source rank's part of the hash.
    """

    slots_EC: Tensor | None
    shares_EC: Tensor | None

    def __init__(self, slots_EC: Tensor | None, shares_EC: Tensor | None, *, salt: int) -> None:
        super().__init__()
        self.register_buffer("slots_EC", slots_EC, persistent=False)
        self.register_buffer("shares_EC", shares_EC, persistent=False)
        self._salt = salt * _MIX_1 % (1 << 63)

    def forward(self, ids_TK: Tensor, hash_T: Tensor | None) -> Tensor:
        """Physical slots (T, K) int64 of logical ids (T, K). `hash_T` int64 tells rows apart where there are copies."""
        if self.slots_EC is None:
            return ids_TK
        if self.shares_EC is None or self.shares_EC.shape[1] == 1:
            return torch.take(self.slots_EC, ids_TK)
        assert hash_T is not None, "experts with copies need the rows' hashes"
        copies_TK = (self._draws(ids_TK, hash_T).unsqueeze(-1) >= self.shares_EC[ids_TK]).sum(dim=-1)
        return self.slots_EC[ids_TK, copies_TK]

    @property
    def is_identity(self) -> bool:
        """Whether a slot is its expert, now and later."""
        return self.slots_EC is None

    def update(self, slots_EC: Tensor, shares_EC: Tensor) -> None:
        """Another placement or other shares; written into the same memory unless the most copies are other ones."""
        assert self.slots_EC is not None, "experts cut by width have no placement"
        assert self.shares_EC is not None
        if self.slots_EC.shape == slots_EC.shape:
            self.slots_EC.copy_(slots_EC)
            self.shares_EC.copy_(shares_EC)
        else:
            self.slots_EC, self.shares_EC = slots_EC, shares_EC

    def _draws(self, ids_TK: Tensor, hash_T: Tensor) -> Tensor:
        """(T, K) float32 in [0, 1), as if drawn anew for each row, layer, expert and source rank."""
        mixed = (hash_T.unsqueeze(1) ^ self._salt) + ids_TK * _MIX_1
        mixed = (mixed ^ (mixed >> 30)) * _MIX_2
        mixed = (mixed ^ (mixed >> 27)) * _MIX_1
        return ((mixed >> 40) & 0xFFFFFF).to(torch.float32) / (1 << 24)


def slots_of_copies(row: Sequence[int], num_logical: int, most: int) -> Tensor:
    """int64 (E, C): the slots of each expert's copies, lowest first; places past the last copy repeat it.

    `row` is physical_to_logical (P,); `most` is C, at least the most copies of an expert.
    """
    table = _table(row, num_logical)
    last = np.take_along_axis(table, (table >= 0).sum(axis=1, keepdims=True) - 1, axis=1)
    wide = np.broadcast_to(last, (num_logical, max(most, table.shape[1]))).copy()
    wide[:, : table.shape[1]] = np.where(table >= 0, table, last)
    return torch.from_numpy(wide)


def even_copies(row: Sequence[int], num_logical: int) -> tuple[Tensor, Tensor]:
    """Slots (E, C) and cumulative shares (E, C) under which the copies of an expert share evenly."""
    counts_E = (_table(row, num_logical) >= 0).sum(axis=1)
    shares_EC = np.minimum(np.arange(1, counts_E.max() + 1) / counts_E[:, None], 1.0)
    return slots_of_copies(row, num_logical, int(counts_E.max())), torch.from_numpy(shares_EC.astype(np.float32))


def _table(row: Sequence[int], num_logical: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    table = Placement(np.array([row], dtype=np.int64), (0, len(row)), num_logical).logical_to_physical()
    return table.reshape(num_logical, -1)
