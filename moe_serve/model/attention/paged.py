"""Attention by compiled kernels: rotated straight into the cache, attended straight from it, nothing gathered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moe_kernels.attention.attention import attention
from moe_kernels.rotary.rotary import rotary
from torch import Tensor

from moe_serve.model.attention.base import StepShape
from moe_serve.model.context import ForwardContext, LayerKV
from moe_serve.model.layers.norm import HeadNorm
from moe_serve.model.layers.rope import Rotation


@dataclass(frozen=True, slots=True)
class PagedPlan:
    """`slots_T` where each row's k and v go; the rest as moe_kernels.attention wants it."""

    slots_T: Tensor
    blocks: Tensor
    sequences_S4: Tensor
    block_size: int


class Paged:
    """See the module. Implements AttentionBackend, for bfloat16 on a CPU."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device, path: str | None = None
    ) -> None:
        assert path is not None, "paged attention is compiled"
        self._path, self._scale = path, head_dim**-0.5

    def plan(self, step: StepShape) -> PagedPlan:
        return PagedPlan(
            slots_T=torch.from_numpy(step.slots_T),
            blocks=torch.from_numpy(step.blocks),
            sequences_S4=torch.from_numpy(step.sequences_S4),
            block_size=step.block_size,
        )

    def forward(
        self,
        q_THd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        rotation: Rotation,
        kv: LayerKV,
        ctx: ForwardContext,
        norm: HeadNorm | None = None,
    ) -> Tensor:
        plan = ctx.attention
        assert isinstance(plan, PagedPlan)
        q_THd = rotary(
            self._path,
            q_THd,
            k_TGd,
            v_TGd,
            kv.k_NGd,
            kv.v_NGd,
            plan.slots_T,
            rotation.cos,
            rotation.sin,
            scales_d=None if norm is None else (norm.q_scale_d, norm.k_scale_d),
            eps=0.0 if norm is None else norm.eps,
        )
        return attention(
            self._path,
            q_THd,
            kv.k_NGd,
            kv.v_NGd,
            plan.blocks,
            plan.sequences_S4,
            block_size=plan.block_size,
            scale=self._scale,
        )
