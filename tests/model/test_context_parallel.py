"""Ranks that share a KV cache: any mix of chunks and decodes equals dense attention, whatever part of it each holds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.model_config import load_model_config
from moe_serve.base.topology import Topology
from moe_serve.model.attention import context_parallel
from moe_serve.model.layers.norm import HeadNorm
from moe_serve.model.partition import make_partition
from tests.support.attending import Cache, random_life
from tests.support.dummy_model import dummy_model
from tests.support.forward import rank_logits
from tests.support.ranks import Ranks, Seat
from tests.support.tiny_model import tiny_model

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as spawned:
        yield spawned


def life(seat: Seat, size: int, heads: int, block_size: int, dtype: torch.dtype, seed: int, scores: int) -> None:
    before, context_parallel.SCORES = context_parallel.SCORES, scores
    group = seat.group(size)
    cache = Cache("sdpa", (heads, 1), block_size=block_size, num_blocks=140, dtype=dtype, seed=seed, sharing=group)
    for part in (cache.kv.k_NGd, cache.kv.v_NGd):
        part.fill_(torch.nan)  # what another sequence left may be anything
    try:
        random_life(cache, [17, 1, 9, 30, 4, 2, 12, 65], seed)
    finally:
        context_parallel.SCORES = before


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("size", "heads", "block_size"), [(2, 2, 2), (2, 6, 8), (4, 8, 4), pytest.param(3, 3, 6, marks=pytest.mark.long)]
)
def test_any_mix_of_chunks_and_decodes_equals_dense_attention(
    ranks: Ranks, size: int, heads: int, block_size: int, seed: int
) -> None:
    ranks.run(life, size, heads, block_size, torch.float32, seed, context_parallel.SCORES, only=size)


def test_parts_of_few_scores_give_the_same(ranks: Ranks) -> None:
    ranks.run(life, 2, 4, 4, torch.float32, 1, 64, only=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_types_are_close(ranks: Ranks, dtype: torch.dtype) -> None:
    ranks.run(life, 2, 4, 4, dtype, 5, context_parallel.SCORES, only=2)


def normed_life(seat: Seat) -> None:
    numbers = torch.Generator().manual_seed(1)
    scales = [1 + torch.rand(8, generator=numbers) for _ in "qk"]
    random_life(Cache("sdpa", (4, 1), norm=HeadNorm(scales[0], scales[1], 1e-6), sharing=seat.group(2)), [17, 1, 30], 3)


def test_heads_are_normed_before_they_are_rotated(ranks: Ranks) -> None:
    ranks.run(normed_life, only=2)


def kept(seat: Seat) -> tuple[list[int], int]:
    """Positions of one sequence whose keys lie here, and how many places of the cache hold anything."""
    cache = Cache("sdpa", (2, 1), block_size=4, num_blocks=8, sharing=seat.group(2))
    cache.kv.k_NGd.fill_(1000.0)
    sequence = cache.sequence(11)
    cache.step([(sequence, 7)])
    for _ in range(4):
        cache.step([(sequence, 1)])
    rows = cache.kv.k_NGd
    places = [block * 2 + offset for block in sequence.block_ids for offset in range(2)]
    found = [
        position
        for position in range(sequence.length)
        if any(torch.equal(rows[place], sequence.rotated_k[position]) for place in places)
    ]
    return found, int((rows != 1000).any(dim=2).sum())


def test_each_rank_keeps_its_part_of_every_block_and_nothing_else(ranks: Ranks) -> None:
    assert ranks.run(kept, only=2) == [([0, 1, 4, 5, 8, 9], 6), ([2, 3, 6, 7, 10], 5)]


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize(("dp", "tp", "kv_heads", "dcp"), [(1, 2, 1, 2), (1, 4, 1, 4), (1, 4, 2, 2), (2, 2, 1, 2)])
def test_a_model_whose_ranks_share_a_cache_gives_the_same_logits(
    ranks: Ranks, dp: int, tp: int, kv_heads: int, dcp: int, chunk: int | None, tmp_path: Path
) -> None:
    oracle = tiny_model(tmp_path, "qwen2_moe", seed=2, num_key_value_heads=kv_heads)
    numbers = random.Random(dcp)
    asked = [[[numbers.randrange(3, 131) for _ in range(length)] for length in (21, 2, 14)], [[7, 5, 3]]][:dp]
    options = {"data_parallel_size": dp, "tensor_parallel_size": tp, "decode_context_parallel_size": dcp}
    answers = ranks.run(rank_logits, tmp_path, asked, chunk, options, only=dp * tp)
    for rank, found in enumerate(answers):
        for prompt, logits in zip(asked[rank // tp], found, strict=True):
            with torch.inference_mode():
                expected = oracle(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(torch.from_numpy(logits), expected, atol=2e-4, rtol=2e-4)


def test_neighbours_on_the_tensor_axis_share_a_cache() -> None:
    topology = Topology(dp=2, tp=4, dcp=2)
    assert [topology.dcp_group(rank) for rank in range(8)] == [(0, 1)] * 2 + [(2, 3)] * 2 + [(4, 5)] * 2 + [(6, 7)] * 2
    assert Topology(tp=2).dcp_group(1) == (1,)


@pytest.mark.parametrize(
    ("tp", "dcp", "kv_heads", "works"),
    [(4, 2, 4, "the 1 tensor-parallel ranks .*work: 1$"), (4, 4, 2, "the 2 .*work: 1, 2$"), (2, 2, 2, "work: 1$")],
)
def test_only_ranks_that_would_hold_the_same_head_can_share(
    tp: int, dcp: int, kv_heads: int, works: str, tmp_path: Path
) -> None:
    folder = dummy_model(tmp_path, num_attention_heads=8, num_key_value_heads=kv_heads)
    options = {"tensor_parallel_size": tp, "decode_context_parallel_size": dcp}
    with pytest.raises(ConfigError, match=f"--decode-context-parallel-size {dcp} does not divide .*{works}"):
        make_partition(load_model_config(folder), Config.from_flat(options).parallel, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tensor_parallel_size": 4, "decode_context_parallel_size": 3},
            r"\(3\) must divide tensor_parallel_size \(4\)",
        ),
        (
            {"tensor_parallel_size": 4, "decode_context_parallel_size": 4, "block_size": 6},
            r"block_size \(6\) must be a multiple of decode_context_parallel_size \(4\)",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_flat(options)
