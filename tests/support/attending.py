"""Attention backends taken through random lives of sequences, against a naive dense oracle."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_serve.model.attention.base import ATTENTION, AttentionBackend, StepShape
from moe_serve.model.attention.context_parallel import ContextParallel
from moe_serve.model.context import ForwardContext, LayerKV
from moe_serve.model.layers.norm import HeadNorm
from moe_serve.model.layers.rope import Rope, Rotation, rotate
from moe_serve.parallel.collectives import Group

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CPU = torch.device("cpu")


def rotation_of(positions_T: Tensor, like: Tensor) -> Rotation:
    return Rope(like.shape[2], 100.0, like.device).rotation(positions_T.to(like.device), like.dtype)


def naive(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
    """Causal attention of a whole sequence in float64, one query and one head at a time."""
    q, k, v = (part.double().cpu() for part in (q_THd, k_TGd, v_TGd))
    out = torch.empty_like(q)
    share = q.shape[1] // k.shape[1]
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = k[: t + 1, h // share] @ q[t, h] / math.sqrt(q.shape[2])
            out[t, h] = scores.softmax(0) @ v[: t + 1, h // share]
    return out


@dataclass(eq=False)
class Sequence:
    """All q, k and v a sequence will ever have, and how far it is. `rotated_k` is what lies in the cache."""

    q_THd: Tensor
    k_TGd: Tensor
    v_TGd: Tensor
    norm: HeadNorm | None = None
    block_ids: list[int] = field(default_factory=list)
    done: int = 0
    rotated_k: Tensor = field(init=False)
    expected: Tensor = field(init=False)

    def __post_init__(self) -> None:
        q_THd, k_TGd = (self.q_THd, self.k_TGd) if self.norm is None else self.norm(self.q_THd, self.k_TGd)
        rotation = rotation_of(torch.arange(self.length), self.q_THd)
        self.rotated_k = rotate(k_TGd, rotation)
        self.expected = naive(rotate(q_THd, rotation), self.rotated_k, self.v_TGd)

    @property
    def length(self) -> int:
        return self.q_THd.shape[0]


class Cache:
    """A backend, a cache full of large numbers that nobody may see, and sequences stepping through it.

    `sharing`: of a rank that shares the cache with these, and attends for its part of the query heads.
    """

    def __init__(
        self,
        name: str,
        heads: tuple[int, int],
        *,
        head_dim: int = 8,
        block_size: int = 4,
        num_blocks: int = 64,
        dtype: torch.dtype | None = None,
        device: torch.device = CPU,
        seed: int = 0,
        norm: HeadNorm | None = None,
        sharing: Group | None = None,
    ) -> None:
        self.heads, self.head_dim, self.block_size = heads, head_dim, block_size
        backend, _, path = name.partition(" ")
        dtype = dtype or (torch.bfloat16 if path else torch.float32)
        self.dtype, self.device, self.norm = dtype, device, norm
        self.numbers = torch.Generator().manual_seed(seed)
        self.backend: AttentionBackend
        if sharing is None:
            kind: Any = ATTENTION.load(backend)
            self.backend = kind(*heads, head_dim, device, path or None)
            self.own, kept = slice(None), block_size
        else:
            num_heads, kept = heads[0] // sharing.size, block_size // sharing.size
            self.own = slice(sharing.rank * num_heads, (sharing.rank + 1) * num_heads)
            self.backend = ContextParallel(num_heads, head_dim, sharing, device)
        size = (num_blocks * kept, heads[1], head_dim)
        self.kv = LayerKV(*(torch.full(size, 1000.0, dtype=dtype, device=device) for _ in "kv"))
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)

    def sequence(self, length: int) -> Sequence:
        shapes = [(length, count, self.head_dim) for count in (self.heads[0], self.heads[1], self.heads[1])]
        q, k, v = ((2 * torch.randn(shape, generator=self.numbers)).to(self.dtype).to(self.device) for shape in shapes)
        return Sequence(q, k, v, self.norm)

    def step(self, parts: list[tuple[Sequence, int]]) -> None:
        """Let each sequence take some tokens, and compare what comes out with the oracle."""
        for sequence, count in parts:
            while len(sequence.block_ids) * self.block_size < sequence.done + count:
                sequence.block_ids.append(self.free.pop())
        plan = self.backend.plan(
            StepShape.of(
                [sequence.done for sequence, _ in parts],
                [count for _, count in parts],
                [sequence.block_ids for sequence, _ in parts],
                self.block_size,
            )
        )
        rows = [(sequence, slice(sequence.done, sequence.done + count)) for sequence, count in parts]
        q, k, v = (
            torch.cat([getattr(sequence, name)[part] for sequence, part in rows])
            for name in ("q_THd", "k_TGd", "v_TGd")
        )
        # As a layer makes them: views of one product, not contiguous.
        q = q[:, self.own]
        qkv = torch.cat((q, k, v), dim=1)
        q, k, v = torch.split(qkv, [q.shape[1], self.heads[1], self.heads[1]], dim=1)
        positions = torch.cat([torch.arange(part.start, part.stop) for _, part in rows])
        ctx = ForwardContext(positions, plan, (self.kv,), ())
        out = self.backend.forward(q, k, v, rotation_of(positions, qkv), self.kv, ctx, self.norm)
        expected = torch.cat([sequence.expected[part] for sequence, part in rows])[:, self.own]
        assert out.shape == expected.shape
        assert out.dtype == self.dtype
        difference = (out.double().cpu() - expected).abs().max().item()
        assert difference <= TOLERANCES[self.dtype] * max(1.0, expected.abs().max().item())
        for sequence, count in parts:
            sequence.done += count


def random_life(cache: Cache, lengths: list[int], seed: int) -> None:
    """Sequences come and go; each step a random few take anything from one token to all they have left."""
    choose = random.Random(seed)
    waiting = [cache.sequence(length) for length in lengths]
    while waiting:
        picked = choose.sample(waiting, choose.randint(1, len(waiting)))
        takes = [choose.choice([1, 1, choose.randint(1, sequence.length - sequence.done)]) for sequence in picked]
        cache.step(list(zip(picked, takes, strict=True)))
        for sequence in picked:
            if sequence.done == sequence.length:
                waiting.remove(sequence)
                cache.free += sequence.block_ids  # the next to take a block finds this one's numbers in it
