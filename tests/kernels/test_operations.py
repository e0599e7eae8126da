"""Every compiled operation on every path that this processor can run, against its reference in torch."""

from __future__ import annotations

import math

import pytest
import torch
from moe_kernels.argmax import reference as argmax_reference
from moe_kernels.argmax.argmax import argmax
from moe_kernels.attention import reference as attention_reference
from moe_kernels.attention.attention import attention
from moe_kernels.combine import reference as combine_reference
from moe_kernels.combine.combine import combine
from moe_kernels.experts import reference as experts_reference
from moe_kernels.experts.experts import experts
from moe_kernels.linear import reference as linear_reference
from moe_kernels.linear.linear import linear
from moe_kernels.linear.packing import can_pack, pack, pack_gated, unpack
from moe_kernels.moe import reference as moe_reference
from moe_kernels.moe.moe import moe, moe_terms
from moe_kernels.norm import reference as norm_reference
from moe_kernels.norm.norm import add, add_rms_norm, rms_norm
from moe_kernels.paths import available
from moe_kernels.rotary import reference as rotary_reference
from moe_kernels.rotary.rotary import rotary
from moe_kernels.route import reference as route_reference
from moe_kernels.route.route import route
from moe_kernels.scores import reference as scores_reference
from moe_kernels.scores.scores import scores
from moe_kernels.sorting import reference as sorting_reference
from moe_kernels.sorting.sorting import sort_rows
from torch import Tensor

PATHS = available()
ROWS = (0, 1, 2, 3, 5, 8, 17, 33, 70)
ATTENTION_STEPS = (1.0, 2.0)
"""With AMX a softmax's weights are rounded once more."""
SPAN = 1024
"""Positions after which attention() joins what it has."""


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def packed(weight: Tensor, *, gated: bool = False) -> Tensor:
    copy = weight.clone()
    for each in copy if copy.dim() == 3 else [copy]:
        (pack_gated if gated else pack)(each)
    return copy


def assert_near(got: Tensor, expected: Tensor, *, steps: float = 2.0) -> None:
    """Within some roundings of bfloat16 of the largest value around."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    assert torch.allclose(got.float(), expected.float(), rtol=steps / 256, atol=steps / 256 * largest / 8)


def test_something_was_compiled_here() -> None:
    """Where tests run there is a compiler; without this line all others would be skipped in silence."""
    assert PATHS
    assert PATHS[-1] == "generic"


def test_a_packed_weight_has_the_same_numbers() -> None:
    weight = some(48, 80)
    assert torch.equal(unpack(packed(weight)), weight)
    assert not torch.equal(packed(weight), weight)
    gate, up = some(32, 16, seed=1), some(32, 16, seed=2)
    in_turns = torch.cat((gate[:16], up[:16], gate[16:], up[16:]))
    assert torch.equal(unpack(packed(torch.cat((gate, up)), gated=True)), in_turns)


@pytest.mark.parametrize("shape", [(16, 16), (0, 16), (24, 16), (16, 24), (16, 0)])
def test_only_whole_panels_are_packed(shape: tuple[int, int]) -> None:
    assert can_pack(*shape) == (shape == (16, 16))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("width", "columns"), [(16, 16), (48, 80), (176, 208), (1024, 144)])
def test_linear(path: str, width: int, columns: int) -> None:
    weight, bias = some(columns, width, seed=1), some(columns, seed=2)
    for rows in ROWS:
        x = some(rows, width + 16, seed=rows)[:, 8 : 8 + width]  # rows apart in memory
        for of_bias in (None, bias):
            for wide in (False, True):
                got = linear(path, x, packed(weight), of_bias, wide=wide)
                assert_near(got, linear_reference.linear(x, weight, of_bias, wide=wide), steps=1.0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("hidden", "experts_"), [(16, 1), (24, 4), (100, 67), (1024, 130), (7, 3)])
def test_scores(path: str, hidden: int, experts_: int) -> None:
    weight = torch.randn(experts_, hidden, generator=torch.Generator().manual_seed(1))
    for rows in ROWS:
        x = some(rows, hidden + 3, seed=rows)[:, 3:]
        torch.testing.assert_close(scores(path, x, weight), scores_reference.scores(x, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("hidden", "experts_", "top_k"), [(16, 1, 1), (24, 4, 4), (100, 67, 8), (64, 512, 10), (7, 3, 1)]
)
@pytest.mark.parametrize(("renormalise", "scale"), [(False, 1.0), (True, 1.0), (True, 2.5), (False, 0.5)])
def test_route(path: str, hidden: int, experts_: int, top_k: int, renormalise: bool, scale: float) -> None:
    weight = hidden**-0.5 * torch.randn(experts_, hidden, generator=torch.Generator().manual_seed(1))
    for rows in (*ROWS, 600):
        x = some(rows, hidden + 3, seed=rows)[:, 3:]
        ids, weights = route(path, x, weight, top_k, renormalise=renormalise, scale=scale)
        _, expected = route_reference.route(x, weight, top_k, renormalise=renormalise, scale=scale)
        # Not the reference's ids: scores of another order of summation may be as near as to swap places.
        by_scores = scores(path, x, weight).sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        assert torch.equal(ids, by_scores)
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_of_experts_that_score_the_same_the_lower_one_is_taken_first(path: str) -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    ids, weights = route(path, some(40, 32), weight[[0, 1, 2, 1, 0, 3, 4, 2, 1]], 9)
    places = ids.argsort(dim=1)
    for lower, higher in ((0, 4), (1, 3), (3, 8), (2, 7)):
        assert torch.equal(places[:, lower] + 1, places[:, higher])
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(40))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("vocab", [1, 7, 32, 512, 1000, 16_384, 40_001, 151_936])
def test_argmax(path: str, rows: int, vocab: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    apart = torch.randn(rows, vocab + 3, generator=generator)[:, 3:]
    ties = torch.randint(-3, 4, (rows, vocab), generator=generator).float()
    for logits in (apart, apart.t().contiguous().t(), apart - 1e30, ties, ties - 3, torch.full((rows, vocab), -5.0)):
        ids, sound = argmax(path, logits)
        expected, _ = argmax_reference.argmax(logits)
        assert torch.equal(ids, expected)
        assert sound.dtype == torch.bool
        assert sound.all()
        assert torch.equal(ids, (logits == logits.amax(dim=1, keepdim=True)).long().argmax(dim=1))


@pytest.mark.parametrize("path", [*PATHS, "reference"])
@pytest.mark.parametrize("vocab", [1, 7, 32, 130, 1000, 16_385, 151_936])
def test_argmax_says_which_rows_have_no_token(path: str, vocab: int) -> None:
    places = sorted({0, 1, vocab // 3, vocab // 2, vocab - 2, vocab - 1} & set(range(vocab)))
    logits = torch.randn(2 * len(places) + 2, vocab, generator=torch.Generator().manual_seed(1))
    expected = [True] * len(logits)
    for index, place in enumerate(places):
        for row, bad in ((2 * index, math.nan), (2 * index + 1, math.inf)):
            logits[row, place] = bad
            expected[row] = False
    logits[-1], expected[-1] = -math.inf, False
    if vocab > 1:  # -inf where there are others is a token that is banned
        logits[-2, places[1:]] = -math.inf
    ids, sound = argmax_reference.argmax(logits) if path == "reference" else argmax(path, logits)
    assert sound.tolist() == expected
    assert ids.min() >= 0
    assert ids.max() < vocab
    assert ids[-2] == int(logits[-2].argmax())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("hidden", "width"), [(16, 16), (64, 48), (160, 208)])
@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 2), (17, 33, 0), (0, 0, 5), (70, 1, 4), (9,)])
def test_experts(path: str, hidden: int, width: int, counts: tuple[int, ...]) -> None:
    gate_up, down = some(len(counts), 2 * width, hidden, seed=1), some(len(counts), hidden, width, seed=2)
    gate_up, down = gate_up * hidden**-0.5, down * width**-0.5
    rows, counts_e = some(sum(counts), hidden, seed=3), torch.tensor(counts)
    got = experts(path, rows, counts_e, packed(gate_up, gated=True), packed(down))
    assert_near(got, experts_reference.experts(rows, counts_e, gate_up, down), steps=4.0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [7, 16, 24, 100, 1024])
def test_rms_norm(path: str, size: int) -> None:
    scale = some(size, seed=1)
    for rows in ROWS:
        heads = some(rows, 5, size, seed=rows)[:, 1:4]  # as q lies between k and v
        for x in (some(rows, size, seed=rows), heads):
            assert_near(rms_norm(path, x, scale, 1e-6), norm_reference.rms_norm(x, scale, 1e-6))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [7, 16, 24, 100, 1024])
def test_sums(path: str, size: int) -> None:
    scale = some(size, seed=1)
    for rows in (*ROWS, 600):
        x, delta = some(rows, size, seed=rows), some(rows, size, seed=rows + 1)
        total, normed = add_rms_norm(path, x, delta, scale, 1e-6)
        assert torch.equal(total, x + delta)
        assert torch.equal(normed, rms_norm(path, x + delta, scale, 1e-6))
        assert torch.equal(add(path, x, delta), x + delta)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (1, 3), (17, 3), (700, 2)])
@pytest.mark.parametrize("first_slot", [0, 2])
def test_moe(path: str, id_dtype: torch.dtype, tokens: int, top_k: int, first_slot: int) -> None:
    """Slots from -1 to 5 of which 4 are here: some rows have no expert, and some experts no row."""
    hidden, width = 48, 32
    gate_up, down = some(4, 2 * width, hidden, seed=1) * 0.1, some(4, hidden, width, seed=2) * 0.1
    x = some(tokens, hidden + 16, seed=3)[:, 16:]
    generator = torch.Generator().manual_seed(4)
    slots = torch.randint(-1, 6, (tokens, top_k), generator=generator).to(id_dtype)
    weights = torch.rand(tokens, top_k, generator=generator)
    gate_up_packed, down_packed = packed(gate_up, gated=True), packed(down)
    got = moe(path, x, slots, weights, gate_up_packed, down_packed, first_slot=first_slot)
    assert_near(got, moe_reference.moe(x, slots, weights, gate_up, down, first_slot=first_slot), steps=4.0)
    rows, pairs, counts_e = sort_rows(path, x, slots, first_slot, 4)
    of_pairs = experts(path, rows, counts_e, gate_up_packed, down_packed)
    assert torch.equal(got, combine(path, of_pairs, pairs, weights))
    terms, expected = (torch.full((tokens, top_k, hidden), 7.0, dtype=torch.bfloat16) for _ in range(2))
    expected.flatten(0, 1)[pairs] = of_pairs
    moe_terms(path, x, slots, gate_up_packed, down_packed, terms, first_slot=first_slot)
    assert torch.equal(terms, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(0, 2, 16), (1, 1, 7), (5, 3, 40), (130, 8, 1024)])
def test_combine(path: str, tokens: int, top_k: int, hidden: int) -> None:
    generator = torch.Generator().manual_seed(4)
    pairs = torch.randperm(tokens * top_k, generator=generator)[: tokens * top_k * 2 // 3]
    terms, weights = some(len(pairs), hidden, seed=5), torch.rand(tokens, top_k, generator=generator)
    got = combine(path, terms, pairs, weights)
    assert_near(got, combine_reference.combine(terms, pairs, weights), steps=1.0)
    order = torch.randperm(len(pairs), generator=generator)
    assert torch.equal(combine(path, terms[order], pairs[order], weights), got)
    terms = some(tokens * top_k, hidden, seed=6)
    got = combine(path, terms, None, weights)
    assert_near(got, combine_reference.combine(terms, None, weights), steps=1.0)
    assert torch.equal(combine(path, terms, torch.arange(tokens * top_k), weights), got)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "hidden"), [(0, 2, 16), (1, 1, 7), (5, 3, 40), (130, 8, 33), (12_500, 8, 24)]
)
@pytest.mark.parametrize(("first", "local"), [(0, 20), (3, 5), (17, 3), (7, 0), (40, 2)])
def test_sort_rows(
    path: str, id_dtype: torch.dtype, tokens: int, top_k: int, hidden: int, first: int, local: int
) -> None:
    slots = torch.randint(-1, 20, (tokens, top_k + 1), generator=torch.Generator().manual_seed(7)).to(id_dtype)
    for x, of_them in ((some(tokens, hidden), slots[:, 1:]), (some(tokens, hidden + 3)[:, 3:].float(), slots)):
        got = sort_rows(path, x, of_them, first, local)
        for mine, wanted in zip(got, sorting_reference.sort_rows(x, of_them, first, local), strict=True):
            assert mine.dtype == wanted.dtype
            assert torch.equal(mine, wanted)


class Heads:
    """q, k and v as views of one product, angles, and an empty cache that has more slots than rows."""

    def __init__(self, rows: int, heads: int, kv_heads: int, head_dim: int) -> None:
        qkv = some(rows, heads + 2 * kv_heads, head_dim, seed=rows)
        self.views = qkv.split((heads, kv_heads, kv_heads), dim=1)
        angles = torch.arange(1, rows + 1)[:, None] * torch.rand(head_dim // 2)
        cos, sin = angles.cos(), angles.sin()
        self.cos = torch.stack((cos, cos), dim=1)[:, None].to(torch.bfloat16)
        self.sin = torch.stack((-sin, sin), dim=1)[:, None].to(torch.bfloat16)
        self.slots = torch.randperm(rows + 5, generator=torch.Generator().manual_seed(1))[:rows]
        self.size = (rows + 5, kv_heads, head_dim)

    def caches(self) -> tuple[Tensor, Tensor]:
        return torch.full(self.size, 7.0, dtype=torch.bfloat16), torch.full(self.size, 7.0, dtype=torch.bfloat16)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 2), (4, 2, 24), (6, 2, 64), (8, 1, 128), (3, 3, 70)]
)
def test_rotary(path: str, heads: int, kv_heads: int, head_dim: int) -> None:
    scales = some(head_dim, seed=1), some(head_dim, seed=2)
    for rows in ROWS:
        given = Heads(rows, heads, kv_heads, head_dim)
        caches, expected_caches = given.caches(), given.caches()
        q = rotary(path, *given.views, *caches, given.slots, given.cos, given.sin)
        expected = rotary_reference.rotary(*given.views, *expected_caches, given.slots, given.cos, given.sin)
        for got, wanted in zip((q, *caches), (expected, *expected_caches), strict=True):
            assert torch.equal(got, wanted)  # torch rounds in the same places
        q = rotary(path, *given.views, *caches, given.slots, given.cos, given.sin, scales_d=scales, eps=1e-6)
        expected = rotary_reference.rotary(
            *given.views, *expected_caches, given.slots, given.cos, given.sin, scales_d=scales, eps=1e-6
        )
        for got, wanted in zip((q, *caches), (expected, *expected_caches), strict=True):
            assert_near(got, wanted)


class Cached:
    """Sequences whose keys and values lie in shuffled blocks."""

    def __init__(self, lengths: list[int], kv_heads: int, head_dim: int, block_size: int) -> None:
        self.block_size = block_size
        self.counts = [-(-length // block_size) for length in lengths]
        order = torch.randperm(sum(self.counts) + 3, generator=torch.Generator().manual_seed(6))
        self.blocks = order[: sum(self.counts)].to(torch.int32)
        self.k = some(len(order) * block_size, kv_heads, head_dim, seed=7)
        self.v = some(len(order) * block_size, kv_heads, head_dim, seed=8)

    def sequences(self, parts: list[tuple[int, int]]) -> Tensor:
        """Of (first position, how many) for each sequence, their rows one after the other."""
        rows, row, block = [], 0, 0
        for (start, count), blocks in zip(parts, self.counts, strict=True):
            rows.append((row, count, start, block))
            row, block = row + count, block + blocks
        return torch.tensor(rows)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 16), (4, 2, 24), (6, 2, 64), (8, 1, 128), (2, 2, 7)]
)
@pytest.mark.parametrize("block_size", [1, 16, 24])
def test_attention(path: str, heads: int, kv_heads: int, head_dim: int, block_size: int) -> None:
    parts = [(0, 1), (40, 1), (0, 37), (33, 9), (63, 2), (31, 1)]
    cached = Cached([start + count for start, count in parts], kv_heads, head_dim, block_size)
    q = some(sum(count for _, count in parts), heads + 2, head_dim, seed=9)[:, :heads]
    given = (q, cached.k, cached.v, cached.blocks, cached.sequences(parts))
    got = attention(path, *given, block_size=block_size, scale=head_dim**-0.5)
    expected = attention_reference.attention(*given, block_size=block_size, scale=head_dim**-0.5)
    assert_near(got, expected, steps=ATTENTION_STEPS[path == "amx"])


@pytest.mark.parametrize("path", PATHS)
def test_attention_over_several_spans(path: str) -> None:
    parts = [(SPAN - 1, 1), (SPAN, 1), (3 * SPAN + 5, 1), (2 * SPAN - 3, 6), (5, 1)]
    cached = Cached([start + count for start, count in parts], 2, 32, 16)
    q = some(sum(count for _, count in parts), 4, 32, seed=9)
    given = (q, cached.k, cached.v, cached.blocks, cached.sequences(parts))
    got = attention(path, *given, block_size=16, scale=32**-0.5)
    expected = attention_reference.attention(*given, block_size=16, scale=32**-0.5)
    assert_near(got, expected, steps=ATTENTION_STEPS[path == "amx"])


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_stays_so(path: str) -> None:
    x, weight = some(3, 32), some(16, 32, seed=1)
    x[1, 5] = float("nan")
    got = linear(path, x, packed(weight))
    assert got.isfinite().all(dim=1).tolist() == [True, False, True]
    for top_k in (1, 3, 5):
        ids, weights = route(path, x, torch.randn(5, 32, generator=torch.Generator().manual_seed(1)), top_k)
        assert all(len(set(row)) == top_k and set(row) <= set(range(5)) for row in ids.tolist())
        assert weights.isfinite().all(dim=1).tolist() == [True, False, True]
    assert rms_norm(path, x, some(32), 1e-6).isfinite().all(dim=1).tolist() == [True, False, True]
    gate_up, down = some(1, 32, 32, seed=1), some(1, 32, 16, seed=2)
    got = experts(path, x, torch.tensor([3]), packed(gate_up, gated=True), packed(down))
    assert got.isfinite().all(dim=1).tolist() == [True, False, True]
    cached = Cached([3, 3], 1, 16, 4)
    cached.k[int(cached.blocks[1]) * 4 + 2, 0, 0] = float("nan")
    q = some(6, 1, 16)
    given = (q, cached.k, cached.v, cached.blocks, cached.sequences([(0, 3), (0, 3)]))
    got = attention(path, *given, block_size=4, scale=0.25)
    assert got.flatten(1).isfinite().all(dim=1).tolist() == [True] * 5 + [False]
