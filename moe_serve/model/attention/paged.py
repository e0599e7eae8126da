"""Attention by the compiled kernel, straight from the cache: nothing is gathered, padded or masked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moe_kernels.attention.attention import attention
from torch import Tensor

from moe_serve.model.attention.base import StepShape, slots_of
from moe_serve.model.context import LayerKV


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
        rows: list[tuple[int, int, int, int]] = []
        blocks: list[int] = []
        first_row = 0
        for sequence in step.sequences:
            rows.append((first_row, sequence.num_tokens, sequence.start, len(blocks)))
            blocks += sequence.block_ids
            first_row += sequence.num_tokens
        return PagedPlan(
            slots_T=torch.tensor([slot for each in step.sequences for slot in slots_of(each, step.block_size)]).long(),
            blocks=torch.tensor(blocks, dtype=torch.int32),
            sequences_S4=torch.tensor(rows, dtype=torch.int64),
            block_size=step.block_size,
        )

    def forward(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, kv: LayerKV, plan: object) -> Tensor:
        assert isinstance(plan, PagedPlan)
        kv.k_NGd.index_copy_(0, plan.slots_T, k_TGd)
        kv.v_NGd.index_copy_(0, plan.slots_T, v_TGd)
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
