"""Every attention backend against a naive dense oracle: mixed prefill chunks and decodes over scattered blocks."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from moe_kernels.paths import available
from torch import Tensor

from moe_serve.model.attention.base import ATTENTION, AttentionBackend, StepShape
from moe_serve.model.context import LayerKV
from moe_serve.model.layers.norm import HeadNorm
from moe_serve.model.layers.rope import Rope, Rotation, rotate

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CPU = torch.device("cpu")
NAMES = ["sdpa", *(f"paged {path}" for path in available()[:1])]
"""A backend's, and the compiled path that it runs on, for bfloat16. All paths: tests/kernels."""
HEADS = [(4, 4), (4, 2), (6, 1), (1, 1)]


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
    """A backend, a cache full of large numbers that nobody may see, and sequences stepping through it."""

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
    ) -> None:
        self.heads, self.head_dim, self.block_size = heads, head_dim, block_size
        backend, _, path = name.partition(" ")
        dtype = dtype or (torch.bfloat16 if path else torch.float32)
        self.dtype, self.device, self.norm = dtype, device, norm
        self.numbers = torch.Generator().manual_seed(seed)
        kind: Any = ATTENTION.load(backend)
        self.backend: AttentionBackend = kind(*heads, head_dim, device, path or None)
        size = (num_blocks * block_size, heads[1], head_dim)
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
        qkv = torch.cat((q, k, v), dim=1)
        views = qkv.split((self.heads[0], self.heads[1], self.heads[1]), dim=1)
        positions = torch.cat([torch.arange(part.start, part.stop) for _, part in rows])
        out = self.backend.forward(*views, rotation_of(positions, qkv), self.kv, plan, self.norm)
        expected = torch.cat([sequence.expected[part] for sequence, part in rows])
        assert out.shape == expected.shape
        assert out.dtype == self.dtype
        difference = (out.double().cpu() - expected).abs().max().item()
        assert difference <= TOLERANCES[self.dtype] * max(1.0, expected.abs().max().item())
        for sequence, count in parts:
            sequence.done += count


def test_every_backend_of_the_table_is_tried() -> None:
    assert {name.partition(" ")[0] for name in NAMES} == set(ATTENTION)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_any_mix_of_chunks_and_decodes_equals_dense_attention(name: str, heads: tuple[int, int], seed: int) -> None:
    random_life(Cache(name, heads, seed=seed), [17, 1, 9, 30, 4, 2, 12], seed)


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 64])
def test_any_block_size_will_do(name: str, block_size: int) -> None:
    random_life(Cache(name, (4, 2), block_size=block_size, num_blocks=120), [33, 5, 20, 16], block_size)


@pytest.mark.parametrize("head_dim", [2, 10, 64, 128])
def test_any_even_head_dimension_will_do(name: str, head_dim: int) -> None:
    random_life(Cache(name, (4, 2), head_dim=head_dim), [9, 12, 3], head_dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_types_are_close(name: str, dtype: torch.dtype) -> None:
    if name != "sdpa" and dtype == torch.float16:
        pytest.skip("compiled for bfloat16")
    random_life(Cache(name, (4, 2), head_dim=16, dtype=dtype), [9, 12, 3, 25], 5)


def test_heads_are_normed_before_they_are_rotated(name: str) -> None:
    numbers = torch.Generator().manual_seed(1)
    dtype = torch.float32 if name == "sdpa" else torch.bfloat16
    scales = [(1 + torch.rand(8, generator=numbers)).to(dtype) for _ in "qk"]
    random_life(Cache(name, (4, 2), norm=HeadNorm(scales[0], scales[1], 1e-6)), [17, 1, 9, 30], 3)


def test_many_decodes_of_very_different_lengths_in_one_step(name: str) -> None:
    cache = Cache(name, (4, 2), num_blocks=256)
    sequences = [cache.sequence(length) for length in (2, 3, 90, 17, 2, 64, 33, 9, 120)]
    cache.step([(sequence, sequence.length - 2) for sequence in sequences if sequence.length > 2])
    for _ in range(2):
        cache.step([(sequence, 1) for sequence in sequences])


def test_decodes_between_chunks_keep_their_rows(name: str) -> None:
    cache = Cache(name, (4, 2))
    first, second, third, fourth = (cache.sequence(length) for length in (10, 20, 11, 8))
    cache.step([(first, 8), (third, 9)])
    cache.step([(second, 6), (first, 1), (fourth, 4), (third, 1)])
    cache.step([(third, 1), (second, 14), (first, 1), (fourth, 4)])


def test_sequences_that_share_a_prefix_share_its_blocks(name: str) -> None:
    cache = Cache(name, (4, 2))
    first, second = cache.sequence(10), cache.sequence(9)
    second.k_TGd[:8], second.v_TGd[:8] = first.k_TGd[:8], first.v_TGd[:8]
    second.__post_init__()
    cache.step([(first, 10)])
    second.block_ids, second.done = first.block_ids[:2], 8
    cache.step([(second, 1)])


def test_new_keys_and_values_lie_in_their_slots_and_nowhere_else(name: str) -> None:
    cache = Cache(name, (4, 2))
    sequence = cache.sequence(6)
    cache.step([(sequence, 6)])
    slots = [sequence.block_ids[position // 4] * 4 + position % 4 for position in range(6)]
    assert torch.equal(cache.kv.k_NGd[slots], sequence.rotated_k)
    assert torch.equal(cache.kv.v_NGd[slots], sequence.v_TGd)
    theirs = {block * 4 + offset for block in sequence.block_ids for offset in range(4)}
    others = [slot for slot in range(cache.kv.k_NGd.shape[0]) if slot not in theirs]
    assert (cache.kv.k_NGd[others] == 1000).all()
    assert (cache.kv.v_NGd[others] == 1000).all()


def test_a_dummy_step_has_a_plan(name: str) -> None:
    cache = Cache(name, (4, 2))
    plan = cache.backend.plan(StepShape.of([], [], [], 4))
    nothing = torch.empty(0, 8, 8, dtype=cache.dtype)
    rotation = rotation_of(torch.arange(0), nothing)
    out = cache.backend.forward(nothing[:, :4], nothing[:, 4:6], nothing[:, 6:], rotation, cache.kv, plan)
    assert out.shape == (0, 4, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_it_computes_the_same_on_a_cuda_device(heads: tuple[int, int], dtype: torch.dtype) -> None:
    cache = Cache("sdpa", heads, head_dim=64, dtype=dtype, device=torch.device("cuda"))
    random_life(cache, [17, 1, 9, 30, 4, 2, 12], 7)
