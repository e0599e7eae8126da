"""Every attention backend against a naive dense oracle: mixed prefill chunks and decodes over scattered blocks."""

from __future__ import annotations

import pytest
import torch
from moe_kernels.paths import available

from moe_serve.model.attention.base import ATTENTION, StepShape
from moe_serve.model.context import ForwardContext
from moe_serve.model.layers.norm import HeadNorm
from tests.support.attending import TOLERANCES, Cache, random_life, rotation_of

NAMES = ["sdpa", *(f"paged {path}" for path in available()[:1])]
"""A backend's, and the compiled path that it runs on, for bfloat16. All paths: tests/kernels."""
HEADS = [(4, 4), (4, 2), (6, 1), (1, 1)]


def test_every_backend_of_the_table_is_tried() -> None:
    assert {name.partition(" ")[0] for name in NAMES} == set(ATTENTION)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


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
    ctx = ForwardContext(torch.arange(0), plan, (cache.kv,), ())
    out = cache.backend.forward(nothing[:, :4], nothing[:, 4:6], nothing[:, 6:], rotation, cache.kv, ctx)
    assert out.shape == (0, 4, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_it_computes_the_same_on_a_cuda_device(heads: tuple[int, int], dtype: torch.dtype) -> None:
    cache = Cache("sdpa", heads, head_dim=64, dtype=dtype, device=torch.device("cuda"))
    random_life(cache, [17, 1, 9, 30, 4, 2, 12], 7)
