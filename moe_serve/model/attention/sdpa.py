"""Attention by torch's own operations over gathered blocks: the reference, for any device.

Sequences that bring one token are batched in a padded view; longer parts go one by one. Padding is masked, but not
skipped, so it must be finite: the cache starts out as zeros, and a block that a sequence enters without filling it is
wiped, or what another sequence left there (not finite, where something went wrong) would come through the mask.

Shape letters beyond the glossary's: N positions of a padded batch or of one sequence, r query heads per KV head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moe_serve.model.attention.base import Ints, StepShape
from moe_serve.model.context import ForwardContext, LayerKV
from moe_serve.model.layers.norm import HeadNorm
from moe_serve.model.layers.rope import Rotation, rotate


class Row(NamedTuple):
    """A row of StepShape.sequences_S4."""

    first: int
    num_rows: int
    start: int
    first_block: int


CPU_BATCH_ELEMENTS = 2**20
"""Numbers of k (or v) gathered at once on a CPU: 2 MiB in 16 bits stay in its cache between gathering and use."""
MAX_FOLDED_KV_HEADS = 4


@dataclass(slots=True)
class DecodeBatch:
    """Sequences of similar length with one new token each. `blocks` (B x n) flat; `outside_BN` what is not theirs.

    `bias` is what to add to the scores; made by the first layer for all.
    """

    rows: Tensor | slice
    blocks: Tensor
    outside_BN: Tensor
    bias: Tensor | None = None


@dataclass(slots=True)
class Prefill:
    """One sequence's new tokens. `blocks` and `outside_TN` are None when there is nothing before them.

    `bias` as in DecodeBatch.
    """

    rows: slice
    length: int
    blocks: Tensor | None
    outside_TN: Tensor | None
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """`slots_T` where each row's k and v go. `entered` are blocks to wipe first."""

    block_size: int
    slots_T: Tensor
    entered: Tensor | None
    decodes: list[DecodeBatch]
    prefills: list[Prefill]


class SDPA:
    """See the module. Implements AttentionBackend."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device, path: str | None = None
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.queries_per_kv = num_heads // num_kv_heads
        self.device = device
        self._on_cpu = device.type == "cpu"
        # Fresh large tensors cost more in page faults than the copy into them.
        self._scratch = torch.empty(0, device=device)

    def plan(self, step: StepShape) -> AttentionPlan:
        rows = [Row(*row) for row in step.sequences_S4.tolist()]
        return AttentionPlan(
            block_size=step.block_size,
            slots_T=self._tensor(step.slots_T),
            entered=self._entered(rows, step),
            decodes=[
                self._decode_batch(batch, step)
                for batch in self._batches([row for row in rows if row.num_rows == 1], step.block_size)
            ],
            prefills=[self._prefill(row, step.table(index)) for index, row in enumerate(rows) if row.num_rows > 1],
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
        assert isinstance(plan, AttentionPlan)
        if norm is not None:
            q_THd, k_TGd = norm(q_THd, k_TGd)
        q_THd, k_TGd = rotate(q_THd, rotation), rotate(k_TGd, rotation)
        if plan.entered is not None:
            for part in (kv.k_NGd, kv.v_NGd):
                part.view(-1, plan.block_size, *part.shape[1:]).index_fill_(0, plan.entered, 0)
        kv.k_NGd.index_copy_(0, plan.slots_T, k_TGd)
        kv.v_NGd.index_copy_(0, plan.slots_T, v_TGd)
        out_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        for batch in plan.decodes:
            out_THd[batch.rows] = self._decode(q_THd[batch.rows], kv, batch, plan.block_size)
        for prefill in plan.prefills:
            rows = prefill.rows
            out_THd[rows] = self._attend(q_THd[rows], k_TGd[rows], v_TGd[rows], kv, prefill, plan.block_size)
        return out_THd

    def _decode(self, q_BHd: Tensor, kv: LayerKV, batch: DecodeBatch, block_size: int) -> Tensor:
        k_BNGd, v_BNGd = (
            part.view(q_BHd.shape[0], -1, *part.shape[2:]) for part in self._gather(kv, batch, block_size)
        )
        if self._on_cpu and q_BHd.dtype.itemsize == 2 and self.num_kv_heads <= MAX_FOLDED_KV_HEADS:
            return self._decode_folded(q_BHd, k_BNGd, v_BNGd, batch)
        # The queries that share a KV head stand where the query positions usually do: no repeated k and v.
        q_BGrd = q_BHd.reshape(-1, self.num_kv_heads, self.queries_per_kv, self.head_dim)
        if batch.bias is None:
            batch.bias = _bias(batch.outside_BN, q_BHd.dtype)[:, None, None]
        mask = batch.bias.expand(-1, 1, self.queries_per_kv, -1)
        k, v = k_BNGd.transpose(1, 2), v_BNGd.transpose(1, 2)
        return functional.scaled_dot_product_attention(q_BGrd, k, v, attn_mask=mask).reshape(q_BHd.shape)

    def _decode_folded(self, q_BHd: Tensor, k_BNGd: Tensor, v_BNGd: Tensor, batch: DecodeBatch) -> Tensor:
        """Every query head against every KV head, the wrong ones masked: twice as fast as torch's kernel in 16 bits.

        The products are thin and their tiles half empty, so that a few more heads cost nothing.
        """
        count = q_BHd.shape[0]
        if batch.bias is None:
            group_of_H = torch.arange(self.num_heads, device=self.device) // self.queries_per_kv
            wrong_HG = group_of_H[:, None] != torch.arange(self.num_kv_heads, device=self.device)
            outside_BHNG = batch.outside_BN[:, None, :, None] | wrong_HG[:, None]
            batch.bias = _bias(outside_BHNG, q_BHd.dtype).view(count, self.num_heads, -1)
        keys, values = k_BNGd.view(count, -1, self.head_dim), v_BNGd.view(count, -1, self.head_dim)
        scores = torch.baddbmm(batch.bias, q_BHd, keys.transpose(1, 2), alpha=self.head_dim**-0.5)
        return torch.bmm(scores.softmax(dim=-1), values)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, kv: LayerKV, part: Prefill, block_size: int) -> Tensor:
        if part.blocks is not None:
            k, v = (rows.flatten(0, 1)[: part.length] for rows in self._gather(kv, part, block_size))
        if part.outside_TN is not None and part.bias is None:
            part.bias = _bias(part.outside_TN, q.dtype)
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=part.bias,
            is_causal=part.bias is None,
            enable_gqa=self.queries_per_kv > 1,
        )
        return out[0].transpose(0, 1)

    def _gather(self, kv: LayerKV, part: DecodeBatch | Prefill, block_size: int) -> tuple[Tensor, Tensor]:
        """k and v of some blocks, each (blocks, block size, G, d); overwritten by the next call."""
        assert part.blocks is not None
        shape = (len(part.blocks), block_size, self.num_kv_heads, self.head_dim)
        size = part.blocks.numel() * block_size * self.num_kv_heads * self.head_dim
        if self._scratch.numel() < 2 * size or self._scratch.dtype != kv.k_NGd.dtype:
            self._scratch = torch.empty(2 * size, dtype=kv.k_NGd.dtype, device=self.device)
        k, v = self._scratch[:size].view(shape), self._scratch[size : 2 * size].view(shape)
        for cache, out in ((kv.k_NGd, k), (kv.v_NGd, v)):
            torch.index_select(cache.view(-1, *shape[1:]), 0, part.blocks, out=out)
        return k, v

    def _entered(self, rows: list[Row], step: StepShape) -> Tensor | None:
        size = step.block_size
        ends = ((row, row.start + row.num_rows) for row in rows)
        places = [row.first_block + end // size for row, end in ends if end % size and end // size * size >= row.start]
        return self._tensor(step.blocks[places]) if places else None

    def _batches(self, decodes: list[Row], block_size: int) -> list[list[Row]]:
        """The shortest of a batch has at least half the blocks of the longest; each batch in order of rows."""
        block_elements = block_size * self.num_kv_heads * self.head_dim
        batches: list[list[Row]] = []
        longest = most = 0
        for row in sorted(decodes, key=lambda row: -row.start):
            blocks = row.start // block_size + 1
            if not batches or 2 * blocks < longest or len(batches[-1]) >= most:
                batches.append([])
                longest = blocks
                most = max(1, CPU_BATCH_ELEMENTS // (longest * block_elements)) if self._on_cpu else len(decodes)
            batches[-1].append(row)
        return [sorted(batch) for batch in batches]

    def _decode_batch(self, batch: list[Row], step: StepShape) -> DecodeBatch:
        """Padding repeats a sequence's own first block, so that nobody reads another's."""
        starts_B = np.array([row.start for row in batch])
        firsts_B = np.array([row.first_block for row in batch])
        places_n = np.arange(int(starts_B.max()) // step.block_size + 1)
        places_Bn = np.where(places_n * step.block_size <= starts_B[:, None], places_n, 0) + firsts_B[:, None]
        positions_N = np.arange(len(places_n) * step.block_size)
        first, last = batch[0].first, batch[-1].first
        neighbours = last - first + 1 == len(batch)
        return DecodeBatch(
            rows=slice(first, last + 1) if neighbours else self._tensor(np.array([row.first for row in batch])),
            blocks=self._tensor(step.blocks[places_Bn.ravel()]),
            outside_BN=torch.from_numpy(positions_N > starts_B[:, None]).to(self.device, non_blocking=True),
        )

    def _prefill(self, row: Row, table: Ints) -> Prefill:
        rows, length = slice(row.first, row.first + row.num_rows), row.start + row.num_rows
        if row.start == 0:
            return Prefill(rows, length, None, None)
        positions = torch.arange(row.start, length, device=self.device)
        outside_TN = torch.arange(length, device=self.device) > positions[:, None]
        return Prefill(rows, length, self._tensor(table), outside_TN)

    def _tensor(self, values: Ints) -> Tensor:
        values = values.astype(np.int64, copy=False)
        return torch.from_numpy(values) if self._on_cpu else torch.from_numpy(values).to(self.device, non_blocking=True)


def _bias(outside: Tensor, dtype: torch.dtype) -> Tensor:
    """0 inside, -inf outside."""
    return torch.zeros(outside.shape, dtype=dtype, device=outside.device).masked_fill_(outside, float("-inf"))
