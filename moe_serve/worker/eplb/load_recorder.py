"""Counts which experts this rank's rows chose: by layer, prefill or decode, and logical expert. No host sync.

Shape letters: L layers, S rows of this rank, K top-k, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PREFILL, DECODE = 0, 1
MAX_STEPS, MAX_ROWS = 16, 4096
"""Steps that are counted together, and how many of their rows at most (or one step's)."""


class LoadRecorder:
    """Counts several steps and all layers at once: a few small operations, whatever the number of layers."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self._counts_L2E = torch.zeros((num_layers, 2, num_experts), dtype=torch.int64, device=device)
        self._layers_L11 = torch.arange(num_layers, device=device).view(-1, 1, 1) * (2 * num_experts)
        self._num_experts = num_experts
        self._one = torch.ones((), dtype=torch.int64, device=device)
        self._steps: list[tuple[Sequence[Tensor], Tensor]] = []
        self._num_rows = 0

    def add(self, routes: Sequence[Tensor], decode_S: Tensor) -> None:
        """Count a step. `routes` one (S, K) int64 of logical experts per layer; `decode_S` int64, 1 for decode rows.

        The tensors are kept for a while: nobody may change them afterwards.
        """
        num_rows = decode_S.shape[0]
        if not num_rows or not len(self._layers_L11):  # a stage may have no experts
            return
        self._steps.append((routes, decode_S))
        self._num_rows += num_rows
        if len(self._steps) == MAX_STEPS or self._num_rows >= MAX_ROWS:
            self._count()

    def _count(self) -> None:
        by_layer = zip(*(routes for routes, _ in self._steps), strict=True)
        rows_NK = torch.cat([ids_SK for layer in by_layer for ids_SK in layer])  # N = layers x rows
        places = rows_NK.view(len(self._layers_L11), self._num_rows, -1) + self._layers_L11
        places += (torch.cat([decode_S for _, decode_S in self._steps]) * self._num_experts).unsqueeze(1)
        flat = places.view(-1)
        self._counts_L2E.view(-1).scatter_add_(0, flat, self._one.expand(flat.shape))
        self._steps, self._num_rows = [], 0

    def take(self) -> Tensor:
        """int64 (L, 2, E) since the last take; `[:, PREFILL]` and `[:, DECODE]`."""
        if self._steps:
            self._count()
        taken = self._counts_L2E.clone()
        self._counts_L2E.zero_()
        return taken
