"""A dense mixture of experts on one rank, one row and one expert at a time: what every backend is compared with.

Shape letters: T rows, K top-k, E experts, D hidden, F expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class DenseExperts:
    """All experts of a layer: `gate_up` (E, 2F, D), `down` (E, D, F), in float64."""

    gate_up: Tensor
    down: Tensor

    def __call__(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """(T, D) float64: the weighted sum of the named experts' outputs; id -1 adds nothing."""
        out_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
        for t, (ids, weights) in enumerate(zip(ids_TK.tolist(), weights_TK.tolist(), strict=True)):
            for expert, scale in zip(ids, weights, strict=True):
                if expert >= 0:
                    out_TD[t] += scale * self._expert(expert, x_TD[t].double())
        return out_TD

    def _expert(self, expert: int, x_D: Tensor) -> Tensor:
        gate, up = (self.gate_up[expert] @ x_D).chunk(2)
        return self.down[expert] @ (functional.silu(gate) * up)


def random_experts(num_experts: int, hidden: int, width: int, seed: int) -> DenseExperts:
    """The same numbers on every rank."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn((num_experts, 2 * width, hidden), generator=generator, dtype=torch.float64)
    down = torch.randn((num_experts, hidden, width), generator=generator, dtype=torch.float64)
    return DenseExperts(gate_up / hidden**0.5, down / width**0.5)
