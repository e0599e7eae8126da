"""Counts which experts this rank's rows chose: by layer, prefill or decode, and logical expert. No host sync.

Shape letters: L layers, S rows of this rank, K top-k, E logical experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PREFILL, DECODE = 0, 1


class LoadRecorder:
    """One count for all layers at once after a step: a few small operations, whatever the number of layers."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self._counts_L2E = torch.zeros((num_layers, 2, num_experts), dtype=torch.int64, device=device)
        self._layers_L11 = torch.arange(num_layers, device=device).view(-1, 1, 1) * (2 * num_experts)
        self._num_experts = num_experts
        self._one = torch.ones((), dtype=torch.int64, device=device)

    def add(self, routes: Sequence[Tensor], decode_S: Tensor) -> None:
        """Count a step. `routes` one (S, K) int64 of logical experts per layer; `decode_S` int64, 1 for decode rows."""
        if not decode_S.numel():
            return
        places = torch.stack(list(routes)) + self._layers_L11
        places += (decode_S * self._num_experts).unsqueeze(1)
        flat = places.view(-1)
        self._counts_L2E.view(-1).scatter_add_(0, flat, self._one.expand(flat.shape))

    def take(self) -> Tensor:
        """int64 (L, 2, E) since the last take; `[:, PREFILL]` and `[:, DECODE]`."""
        taken = self._counts_L2E.clone()
        self._counts_L2E.zero_()
        return taken
