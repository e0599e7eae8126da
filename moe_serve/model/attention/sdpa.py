"""Attention by torch's scaled_dot_product_attention over gathered blocks: the reference, for any device.

Sequences that bring one token are batched in a padded view; longer parts go one by one. The cache must start out
finite (zeros): padding is masked, but not skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from moe_serve.model.attention.base import SequenceShape, StepShape
from moe_serve.model.context import LayerKV


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """Sequences of similar length with one new token each. `blocks` (B x n) flat; `outside_BN` what is not theirs."""

    rows: Tensor | slice
    blocks: Tensor
    outside_BN: Tensor
    _bias: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """(B, 1, 1, N): 0 inside, -inf outside; made once per step for all layers."""
        if dtype not in self._bias:
            zeros = torch.zeros(self.outside_BN.shape, dtype=dtype, device=self.outside_BN.device)
            self._bias[dtype] = zeros.masked_fill_(self.outside_BN, float("-inf"))[:, None, None]
        return self._bias[dtype]


@dataclass(frozen=True, slots=True)
class Prefill:
    """One sequence's new tokens. `blocks` and `inside_TN` are None when there is nothing before them."""

    rows: slice
    length: int
    blocks: Tensor | None
    inside_TN: Tensor | None


@dataclass(frozen=True, slots=True)
class Plan:
    """`slots_T` where each row's k and v go."""

    block_size: int
    slots_T: Tensor
    decodes: list[DecodeBatch]
    prefills: list[Prefill]


class SDPA:
    """See the module. Implements AttentionBackend."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> None:
        self.num_kv_heads = num_kv_heads
        self.queries_per_kv = num_heads // num_kv_heads
        self.head_dim = head_dim
        self.device = device

    def plan(self, step: StepShape) -> Plan:
        sizes = [sequence.num_tokens for sequence in step.sequences]
        firsts = [0, *accumulate(sizes)][:-1]
        slots: list[int] = []
        for sequence in step.sequences:
            slots += _slots(sequence, step.block_size)
        decodes = [(row, seq) for row, seq in zip(firsts, step.sequences, strict=True) if seq.num_tokens == 1]
        return Plan(
            block_size=step.block_size,
            slots_T=self._tensor(slots),
            decodes=[self._decode_batch(batch, step.block_size) for batch in _similar(decodes, step.block_size)],
            prefills=[
                self._prefill(row, seq, step.block_size)
                for row, seq in zip(firsts, step.sequences, strict=True)
                if seq.num_tokens > 1
            ],
        )

    def forward(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, kv: LayerKV, plan: object) -> Tensor:
        assert isinstance(plan, Plan)
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
        """The queries that share a KV head stand where the query positions usually do: no repeated k and v."""
        count = q_BHd.shape[0]
        shape = (count, -1, self.num_kv_heads, self.head_dim)
        k, v = (
            _blocks(cache, block_size).index_select(0, batch.blocks).view(shape).transpose(1, 2)
            for cache in (kv.k_NGd, kv.v_NGd)
        )
        bias = batch.bias(q_BHd.dtype)
        q_BGrd = q_BHd.reshape(count, self.num_kv_heads, self.queries_per_kv, self.head_dim)
        mask = bias.expand(count, 1, self.queries_per_kv, bias.shape[-1])
        return functional.scaled_dot_product_attention(q_BGrd, k, v, attn_mask=mask).reshape(q_BHd.shape)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, kv: LayerKV, part: Prefill, block_size: int) -> Tensor:
        if part.blocks is not None:
            k, v = (
                _blocks(cache, block_size).index_select(0, part.blocks).flatten(0, 1)[: part.length]
                for cache in (kv.k_NGd, kv.v_NGd)
            )
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=part.inside_TN,
            is_causal=part.inside_TN is None,
            enable_gqa=self.queries_per_kv > 1,
        )
        return out[0].transpose(0, 1)

    def _decode_batch(self, batch: list[tuple[int, SequenceShape]], block_size: int) -> DecodeBatch:
        """Padding repeats a sequence's own first block, so that nobody reads another's."""
        rows = [row for row, _ in batch]
        width = max(_num_blocks(seq, block_size) for _, seq in batch)
        table = []
        for _, seq in batch:
            used = seq.block_ids[: _num_blocks(seq, block_size)]
            table += used + used[:1] * (width - len(used))
        lengths = self._tensor([seq.start + 1 for _, seq in batch])
        neighbours = rows[-1] - rows[0] + 1 == len(rows)
        return DecodeBatch(
            rows=slice(rows[0], rows[-1] + 1) if neighbours else self._tensor(rows),
            blocks=self._tensor(table),
            outside_BN=torch.arange(width * block_size, device=self.device) >= lengths[:, None],
        )

    def _prefill(self, row: int, seq: SequenceShape, block_size: int) -> Prefill:
        rows = slice(row, row + seq.num_tokens)
        length = seq.start + seq.num_tokens
        if seq.start == 0:
            return Prefill(rows, length, None, None)
        blocks = self._tensor(seq.block_ids[: _num_blocks(seq, block_size)])
        positions = torch.arange(seq.start, length, device=self.device)
        return Prefill(rows, length, blocks, torch.arange(length, device=self.device) <= positions[:, None])

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)


def _num_blocks(sequence: SequenceShape, block_size: int) -> int:
    return -(-(sequence.start + sequence.num_tokens) // block_size)


def _slots(sequence: SequenceShape, block_size: int) -> list[int]:
    return [
        sequence.block_ids[position // block_size] * block_size + position % block_size
        for position in range(sequence.start, sequence.start + sequence.num_tokens)
    ]


def _similar(decodes: list[tuple[int, SequenceShape]], block_size: int) -> list[list[tuple[int, SequenceShape]]]:
    """Batches whose shortest member has at least half the blocks of the longest, each in order of rows."""
    batches: list[list[tuple[int, SequenceShape]]] = []
    longest = 0
    for item in sorted(decodes, key=lambda item: -_num_blocks(item[1], block_size)):
        blocks = _num_blocks(item[1], block_size)
        if not batches or 2 * blocks < longest:
            batches.append([])
            longest = blocks
        batches[-1].append(item)
    return [sorted(batch, key=lambda item: item[0]) for batch in batches]


def _blocks(cache_NGd: Tensor, block_size: int) -> Tensor:
    """(blocks, block size, G, d)."""
    return cache_NGd.view(-1, block_size, *cache_NGd.shape[1:])
