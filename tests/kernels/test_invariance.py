"""A row's bits do not depend on what else is computed, nor on threads: compared bit by bit on every path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from moe_kernels.argmax.argmax import argmax
from moe_kernels.attention.attention import attention
from moe_kernels.experts.experts import experts
from moe_kernels.linear.linear import linear
from moe_kernels.norm.norm import rms_norm
from moe_kernels.paths import available
from moe_kernels.rotary.rotary import rotary
from moe_kernels.route.route import route
from moe_kernels.scores.scores import scores

from tests.kernels.test_operations import SPAN, Cached, Heads, packed, some

PATHS = available()


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("threads")
def test_a_row_of_a_product_is_the_same_alone_and_among_others(path: str) -> None:
    x, weight = some(40, 208), packed(some(144, 208, seed=1))
    whole = linear(path, x, weight)
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 32, 33, 39):
        assert torch.equal(linear(path, x[:rows], weight), whole[:rows]), rows
        assert torch.equal(linear(path, x[-rows:], weight), whole[-rows:]), rows
    scale = some(208, seed=2)
    assert torch.equal(rms_norm(path, x[7:8], scale, 1e-6), rms_norm(path, x, scale, 1e-6)[7:8])
    columns = some(70, 208, seed=3).float()
    assert torch.equal(scores(path, x[35:36], columns), scores(path, x, columns)[35:36])
    wide = torch.randint(0, 60, (9, 40_000), generator=torch.Generator().manual_seed(4)).float()
    assert torch.equal(argmax(path, wide[5:6])[0], argmax(path, wide)[0][5:6])
    x = some(300, 208)
    for alone, among in zip(route(path, x[290:291], columns, 7), route(path, x, columns, 7), strict=True):
        assert torch.equal(alone, among[290:291])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("threads")
def test_a_row_of_an_expert_is_the_same_alone_and_among_others(path: str) -> None:
    gate_up, down = packed(some(3, 96, 64, seed=1), gated=True), packed(some(3, 64, 48, seed=2))
    counts = torch.tensor([13, 0, 34])
    rows = some(47, 64)
    whole = experts(path, rows, counts, gate_up, down)
    for row in (0, 5, 12, 13, 20, 46):
        expert = 0 if row < 13 else 2
        alone = torch.zeros(3, dtype=torch.int64)
        alone[expert] = 1
        assert torch.equal(experts(path, rows[row : row + 1], alone, gate_up, down)[0], whole[row]), row


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("length", [45, SPAN + 70])
def test_a_token_attends_the_same_however_its_prompt_is_cut_and_whoever_is_beside_it(path: str, length: int) -> None:
    cached = Cached([length, 21], 2, 32, 16)
    q = some(length, 6, 32, seed=3)

    def attended(parts: list[tuple[int, int]]) -> torch.Tensor:
        rows = torch.cat([q[start : start + count] for start, count in parts])
        return attention(
            path, rows, cached.k, cached.v, cached.blocks, cached.sequences(parts), block_size=16, scale=32**-0.5
        )

    whole = attended([(0, length), (0, 21)])[:length]
    for at in (1, 8, 13, 40, length - 1):
        first, second = attended([(0, at), (20, 1)])[:at], attended([(at, length - at), (3, 5)])[: length - at]
        assert torch.equal(torch.cat((first, second)), whole), at
    for position in (0, 1, 31, 32, length - 1):
        assert torch.equal(attended([(position, 1), (0, 1)])[0], whole[position]), position


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("threads")
def test_a_head_is_rotated_the_same_alone_and_among_others(path: str) -> None:
    given, scales = Heads(200, 6, 2, 64), (some(64, seed=1), some(64, seed=2))

    def rotated(rows: slice) -> list[torch.Tensor]:
        views, caches = (view[rows] for view in given.views), given.caches()
        turns = given.cos[rows], given.sin[rows]
        q = rotary(path, *views, *caches, given.slots[rows], *turns, scales_d=scales, eps=1e-6)
        return [q, *(cache[given.slots[rows]] for cache in caches)]

    whole = rotated(slice(None))
    for rows in (slice(7, 8), slice(150, 151), slice(3, 90)):
        for alone, among in zip(rotated(rows), whole, strict=True):
            assert torch.equal(alone, among[rows]), rows
