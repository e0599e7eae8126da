"""Attention where ranks share a KV cache: each holds a part of every block, attends to it for the heads of all of them,
and gets its own heads' partial results back, which are joined by their log-sum-exp.

A sequence that begins in this step is attended to as it is, for it all lies here. Partial softmax as in Milakov and
Gimelshein, "Online normalizer calculation for softmax" (2018); joined as in Dao et al., "Flash-Decoding" (2023).

Shape letters beyond the glossary's: J rows of sequences with a past, R ranks that share the cache, M = R x H heads,
B sequences and t rows of each in a part, N positions here of a padded part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moe_serve.base.progress import Phase
from moe_serve.model.attention.base import Ints, StepShape
from moe_serve.model.context import ForwardContext, LayerKV
from moe_serve.model.layers.norm import HeadNorm
from moe_serve.model.layers.rope import Rotation, rotate
from moe_serve.parallel.collectives import Group

SCORES = 2**22
"""Numbers that are computed at once, of one part; 16 MiB."""


@dataclass(frozen=True, slots=True)
class ContextPart:
    """`rows` (B * t,) among those with a past: of B sequences, t rows each, one sequence after the other.

    `blocks` (B x n) flat, of the cache here; `outside_BtN` what a row may not see.
    """

    rows: Tensor
    num_sequences: int
    blocks: Tensor
    outside_BtN: Tensor


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """`kept_T` rows whose k and v are kept here, in `slots_T`; `whole` sequences without a past; `past_J` all other
    rows."""

    kept_T: Tensor
    slots_T: Tensor
    whole: list[slice]
    past_J: Tensor
    parts: list[ContextPart]


class ContextParallel:
    """See the module. Implements AttentionBackend, for ranks that all hold the same one KV head; on any device.

    Of each block of a table this rank keeps the `group.rank`-th of `group.size` equal parts.
    """

    def __init__(self, num_heads: int, head_dim: int, group: Group, device: torch.device) -> None:
        self.num_heads, self.head_dim, self.group, self.device = num_heads, head_dim, group, device

    def plan(self, step: StepShape) -> SharedPlan:
        here = self._here(step.block_size)
        blocks_T, within_T = np.divmod(step.slots_T, step.block_size)
        kept_T = np.flatnonzero(within_T // here == self.group.rank)
        whole: list[slice] = []
        past: list[Ints] = []
        singles: list[tuple[int, int, Ints]] = []
        parts: list[ContextPart] = []
        num_past = 0
        for sequence, (first, count, start, _) in enumerate(step.sequences_S4.tolist()):
            if start == 0:
                whole.append(slice(first, first + count))
                continue
            past.append(np.arange(first, first + count))
            table = step.table(sequence)
            if count == 1:
                singles.append((num_past, start, table))
            else:
                parts += self._of_one(num_past, start, count, table, step.block_size)
            num_past += count
        parts += [self._of_many(batch, step.block_size) for batch in self._batches(singles, here)]
        return SharedPlan(
            kept_T=self._tensor(kept_T),
            slots_T=self._tensor(blocks_T[kept_T] * here + within_T[kept_T] % here),
            whole=whole,
            past_J=self._tensor(np.concatenate(past) if past else np.empty(0, np.int64)),
            parts=parts,
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
        assert isinstance(plan, SharedPlan)
        if norm is not None:
            q_THd, k_TGd = norm(q_THd, k_TGd)
        q_THd, k_TGd = rotate(q_THd, rotation), rotate(k_TGd, rotation)
        kv.k_NGd.index_copy_(0, plan.slots_T, k_TGd.index_select(0, plan.kept_T))
        kv.v_NGd.index_copy_(0, plan.slots_T, v_TGd.index_select(0, plan.kept_T))
        out_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        for rows in plan.whole:
            out_THd[rows] = _causal(q_THd[rows], k_TGd[rows], v_TGd[rows])
        if plan.parts:
            joined_JHd = self._joined(q_THd.index_select(0, plan.past_J), kv, plan, ctx)
            out_THd.index_copy_(0, plan.past_J, joined_JHd.to(out_THd.dtype))
        return out_THd

    def _joined(self, q_JHd: Tensor, kv: LayerKV, plan: SharedPlan, ctx: ForwardContext) -> Tensor:
        size, (num_rows, heads, dim) = self.group.size, q_JHd.shape
        ctx.progress.enter(Phase.TENSOR_PARALLEL)
        everybody = self.group.all_gather(q_JHd).view(size, num_rows, heads, dim)
        ctx.progress.enter(Phase.ATTENTION)
        q_JMd = everybody.transpose(0, 1).reshape(num_rows, size * heads, dim)
        partial_JMe = q_JMd.new_empty((num_rows, size * heads, dim + 1), dtype=torch.float32)
        for part in plan.parts:
            partial_JMe.index_copy_(0, part.rows, self._partial(q_JMd.index_select(0, part.rows), kv, part))
        by_owner = partial_JMe.view(num_rows, size, heads, dim + 1).transpose(0, 1)
        ctx.progress.enter(Phase.TENSOR_PARALLEL)
        mine = self.group.exchange_rows(by_owner.reshape(size, -1)).view(size, num_rows, heads, dim + 1)
        ctx.progress.enter(Phase.ATTENTION)
        shares = (mine[..., -1:] - mine[..., -1:].amax(dim=0)).exp_()
        return (mine[..., :-1] * shares).sum(dim=0) / shares.sum(dim=0)

    def _partial(self, q_JMd: Tensor, kv: LayerKV, part: ContextPart) -> Tensor:
        """Of this rank's positions: what attention to them alone gives, and behind it the log-sum-exp of the scores."""
        count, each, num_here = part.outside_BtN.shape
        heads, dim = q_JMd.shape[1:]
        k_BNd, v_BNd = (
            cache.view(-1, num_here * count // len(part.blocks), dim)
            .index_select(0, part.blocks)
            .view(count, num_here, dim)
            .float()
            for cache in (kv.k_NGd, kv.v_NGd)
        )
        queries = q_JMd.reshape(count, each * heads, dim).float()
        scores = torch.bmm(queries, k_BNd.transpose(1, 2)).mul_(dim**-0.5).view(count, each, heads, num_here)
        scores.masked_fill_(part.outside_BtN[:, :, None], float("-inf"))
        most = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)  # where all is outside
        shares = (scores - most).exp_()
        total = shares.sum(dim=-1, keepdim=True)
        v_BNd = v_BNd.masked_fill(part.outside_BtN[:, -1, :, None], 0)  # not finite, perhaps: another sequence's
        out = torch.bmm(shares.view(count, each * heads, num_here), v_BNd).view(count, each, heads, dim)
        out /= total.clamp(min=torch.finfo(torch.float32).tiny)
        return torch.cat((out, most + total.log()), dim=-1).view(-1, heads, dim + 1)

    def _of_one(self, first: int, start: int, count: int, table: Ints, block_size: int) -> list[ContextPart]:
        """The rows of one sequence, so many at once that their scores are not too many."""
        positions_N = self._positions(len(table), block_size)
        positions_t = np.arange(start, start + count)
        most = max(1, SCORES // (len(positions_N) * self.num_heads * self.group.size))
        return [
            ContextPart(
                rows=self._tensor(np.arange(first + begin, first + min(begin + most, count))),
                num_sequences=1,
                blocks=self._tensor(table),
                outside_BtN=self._tensor((positions_N > positions_t[begin : begin + most, None])[None]),
            )
            for begin in range(0, count, most)
        ]

    def _of_many(self, batch: Sequence[tuple[int, int, Ints]], block_size: int) -> ContextPart:
        """A row of each; padding repeats a sequence's own first block."""
        longest = max(len(table) for _, _, table in batch)
        blocks_Bn = np.array([[*table, *[table[0]] * (longest - len(table))] for _, _, table in batch])
        starts_B = np.array([start for _, start, _ in batch])
        return ContextPart(
            rows=self._tensor(np.array([row for row, _, _ in batch])),
            num_sequences=len(batch),
            blocks=self._tensor(blocks_Bn.ravel()),
            outside_BtN=self._tensor((self._positions(longest, block_size) > starts_B[:, None])[:, None]),
        )

    def _batches(self, singles: Sequence[tuple[int, int, Ints]], here: int) -> list[list[tuple[int, int, Ints]]]:
        """The shortest of a batch has at least half the blocks of the longest."""
        batches: list[list[tuple[int, int, Ints]]] = []
        for single in sorted(singles, key=lambda single: -len(single[2])):
            longest = len(batches[-1][0][2]) if batches else 0
            scores = longest * here * self.num_heads * self.group.size
            if not batches or 2 * len(single[2]) < longest or (len(batches[-1]) + 1) * scores > SCORES:
                batches.append([])
            batches[-1].append(single)
        return batches

    def _positions(self, num_blocks: int, block_size: int) -> Ints:
        """Those of a sequence that lie here, in the order in which its blocks have them."""
        here = self._here(block_size)
        firsts = np.arange(num_blocks) * block_size + self.group.rank * here
        positions_N: Ints = (firsts[:, None] + np.arange(here)).ravel()
        return positions_N

    def _here(self, block_size: int) -> int:
        return block_size // self.group.size

    def _tensor(self, values: Ints) -> Tensor:
        values = values if values.dtype == bool else values.astype(np.int64, copy=False)
        return torch.from_numpy(values).to(self.device, non_blocking=True)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(t, H, d) of a whole sequence."""
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1])
    return out[0].transpose(0, 1)
