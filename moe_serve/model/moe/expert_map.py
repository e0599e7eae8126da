"""ExpertMap: logical expert ids -> physical slots, on the device. No other layer knows where experts live.

Shape letters: T rows, K top-k, E logical experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_serve.base.placement import Placement


class ExpertMap(nn.Module):
    """One layer's map. Without a placement (experts cut by width) a slot is its expert."""

    slot_of_E: Tensor | None

    def __init__(self, placement: Placement | None, layer: int, device: torch.device) -> None:
        super().__init__()
        slots = None if placement is None else torch.from_numpy(placement.first_replica(layer)).to(device)
        self.register_buffer("slot_of_E", slots, persistent=False)

    def forward(self, ids_TK: Tensor) -> Tensor:
        """Physical slots (T, K) int64."""
        return ids_TK if self.slot_of_E is None else self.slot_of_E[ids_TK]
