"""The shared expert: a dense gated MLP that every token passes, scaled by a sigmoid gate of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_serve.model.layers.linear import weight


class SharedExpert(nn.Module):
    """sigmoid(x . scale) * down(silu(gate(x)) * up(x)); whole on every rank, applied to the rank's own rows."""

    def __init__(self, hidden: int, width: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.gate_up = weight(2 * width, hidden, dtype=dtype, device=device)
        self.down = weight(hidden, width, dtype=dtype, device=device)
        self.scale = weight(1, hidden, dtype=dtype, device=device)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = functional.linear(x_TD, self.gate_up).chunk(2, dim=-1)
        out_TD = functional.linear(functional.silu(gate_TF) * up_TF, self.down)
        return torch.sigmoid(functional.linear(x_TD, self.scale)) * out_TD

    def targets(self) -> dict[str, Tensor]:
        """Logical weight -> where it lives."""
        gate, up = self.gate_up.chunk(2)
        return {"gate": gate, "up": up, "down": self.down, "scale": self.scale}
