"""Feed-forward without routing: a gated MLP, as a dense layer and as the expert that every token passes."""

from __future__ import annotations

from functools import partial

import torch
from moe_kernels.experts.experts import experts
from moe_kernels.linear.packing import pack, pack_gated
from moe_kernels.recording import apart
from moe_kernels.scores.scores import scores
from torch import Tensor, nn
from torch.nn import functional

from moe_serve.base.progress import Phase
from moe_serve.model.context import ForwardContext
from moe_serve.model.kernels import path_for
from moe_serve.model.layers.linear import weight
from moe_serve.parallel.collectives import Group


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), or a rank's part of it where `width` is a part."""

    def __init__(
        self, hidden: int, width: int, *, dtype: torch.dtype, device: torch.device, path: str | None = None
    ) -> None:
        super().__init__()
        self.path = path_for(path, width, hidden)
        self.gate_up = weight(2 * width, hidden, dtype=dtype, device=device)
        self.down = weight(hidden, width, dtype=dtype, device=device)

    def finish_loading(self) -> None:
        """Once, when both weights were filled: on a compiled path they lie packed from here on."""
        if self.path is not None:
            pack_gated(self.gate_up)
            pack(self.down)

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.path is not None:
            counts_1 = torch.tensor([x_TD.shape[0]])
            return experts(self.path, x_TD.contiguous(), counts_1, self.gate_up[None], self.down[None])
        gate_TF, up_TF = functional.linear(x_TD, self.gate_up).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate_TF) * up_TF, self.down)

    def targets(self) -> dict[str, Tensor]:
        """Logical weight -> where it lives."""
        gate, up = self.gate_up.chunk(2)
        return {"gate": gate, "up": up, "down": self.down}


class DenseMLP(nn.Module):
    """A dense layer's feed-forward. The TP ranks hold the same rows and each a part of the width; their sum is whole.

    Cut, and not whole on every rank like a shared expert: it is as wide as several experts, and without expert
    parallelism these are cut as well.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        group: Group,
        *,
        dtype: torch.dtype,
        device: torch.device,
        path: str | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.mlp = GatedMLP(hidden, width, dtype=dtype, device=device, path=path)

    def forward(self, x_TD: Tensor, ctx: ForwardContext) -> Tensor:
        """Without rows, on all TP ranks alike, nobody needs anybody."""
        return apart(partial(self._whole, x_TD), ctx) if x_TD.shape[0] else x_TD

    def _whole(self, x_TD: Tensor, ctx: ForwardContext) -> Tensor:
        part_TD: Tensor = self.mlp(x_TD)
        if self.group.size > 1:
            ctx.progress.enter(Phase.TENSOR_PARALLEL)
        return self.group.all_reduce(part_TD)

    def targets(self) -> dict[str, Tensor]:
        """Logical weight -> where it lives."""
        return self.mlp.targets()


class SharedExpert(nn.Module):
    """sigmoid(x . scale) * mlp(x); whole on every rank, applied to the rank's own rows."""

    def __init__(
        self, hidden: int, width: int, *, dtype: torch.dtype, device: torch.device, path: str | None = None
    ) -> None:
        super().__init__()
        self.path = path
        self.mlp = GatedMLP(hidden, width, dtype=dtype, device=device, path=path)
        self.scale = weight(1, hidden, dtype=dtype, device=device)

    def forward(self, x_TD: Tensor) -> Tensor:
        out_TD: Tensor = self.mlp(x_TD)
        if self.path is not None:
            gate_T1 = scores(self.path, x_TD, self.scale.float()).to(x_TD.dtype)
        else:
            gate_T1 = functional.linear(x_TD, self.scale)
        return torch.sigmoid(gate_T1) * out_TD

    def targets(self) -> dict[str, Tensor]:
        """Logical weight -> where it lives."""
        return self.mlp.targets() | {"scale": self.scale}
