"""What bench.kernels times: each operation at some sizes, beside torch; weights that are read are others each time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TypeVar

import torch
from moe_kernels.argmax import reference as argmax_reference
from moe_kernels.argmax.argmax import argmax
from moe_kernels.combine import reference as combine_reference
from moe_kernels.combine.combine import combine
from moe_kernels.experts.experts import experts
from moe_kernels.linear.linear import linear
from moe_kernels.norm.norm import rms_norm
from moe_kernels.rotary import reference as rotary_reference
from moe_kernels.rotary.rotary import rotary
from moe_kernels.route import reference as route_reference
from moe_kernels.route.route import route
from moe_kernels.scores import reference as scores_reference
from moe_kernels.scores.scores import scores
from moe_kernels.sorting import reference as sorting_reference
from moe_kernels.sorting.sorting import sort_rows
from torch import Tensor
from torch.nn import functional

from moe_serve.cli.random_model import Preset
from moe_serve.model.attention.base import AttentionBackend, StepShape
from moe_serve.model.attention.paged import Paged
from moe_serve.model.attention.sdpa import SDPA
from moe_serve.model.context import ForwardContext, LayerKV
from moe_serve.model.layers.norm import rms_norm as torch_rms_norm
from moe_serve.model.layers.rope import Rope
from moe_serve.model.moe.experts import Experts

RING_BYTES = 1 << 30
"""Of weights that are used in turn: more than caches hold."""
HEAD_DIM, BLOCK = 64, 16
T = TypeVar("T")
CPU, BF16 = torch.device("cpu"), torch.bfloat16


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one size: what it must read, what it must compute, and who can do it."""

    name: str
    read_bytes: int
    flops: int
    contestants: dict[str, Callable[[], object]]


def cases(preset: Preset, all_rows: Sequence[int], paths: Sequence[str]) -> Iterator[Case]:
    for rows in all_rows:
        yield linear_case(preset, rows, paths)
    for rows in all_rows:
        yield experts_case(preset, rows, paths)
    for name, sequences in (
        ("16 x 1 of 200", [(199, 1)] * 16),
        ("1 x 1 of 4,000", [(3999, 1)]),
        ("512 of 512", [(0, 512)]),
    ):
        yield attention_case(f"attention, {name}", preset, sequences, paths)
    for rows in all_rows:
        yield norm_case(preset, rows, paths)
    for rows in all_rows:
        yield rotary_case(preset, rows, paths)
    for rows in all_rows:
        yield from routing_cases(preset, rows, paths)
    for rows, vocab in ((1, 151_936), (16, 151_936), (32, 32_000), (32, 512)):
        yield argmax_case(rows, vocab, paths)


def in_turn(things: Sequence[T]) -> Callable[[], T]:
    return partial(next, cycle(things))


def linear_case(preset: Preset, rows: int, paths: Sequence[str]) -> Case:
    columns = (preset.heads + 2 * preset.kv_heads) * HEAD_DIM
    size = columns * preset.hidden * 2
    weights = in_turn([some(columns, preset.hidden) for _ in range(max(2, RING_BYTES // size))])
    x = some(rows, preset.hidden)
    contestants: dict[str, Callable[[], object]] = {"torch": lambda: functional.linear(x, weights())}
    for path in paths:
        contestants[path] = lambda path=path: linear(path, x, weights())
    return Case(f"linear, {rows} rows", size, 2 * rows * columns * preset.hidden, contestants)


def experts_case(preset: Preset, rows: int, paths: Sequence[str]) -> Case:
    """As many rows of the model, each for top_k experts of a layer that are drawn evenly, others each time."""
    hidden, width, num = preset.hidden, preset.width, preset.experts
    generator = torch.Generator().manual_seed(rows)
    draws = [
        torch.stack([torch.randperm(num, generator=generator)[: preset.top_k] for _ in range(rows)]) for _ in range(31)
    ]
    all_counts = [torch.bincount(chosen.flatten(), minlength=num) for chosen in draws]
    drawn = in_turn(all_counts)
    size = num * 3 * hidden * width * 2
    layers = [layer for _ in range(max(2, RING_BYTES // size)) if (layer := Experts(num, hidden, width, BF16, CPU))]
    for layer in layers:
        layer.gate_up.normal_(0, hidden**-0.5)
        layer.down.normal_(0, width**-0.5)
    following = in_turn(layers)
    x = some(rows * preset.top_k, hidden)

    def compiled(path: str) -> Tensor:
        layer = following()
        return experts(path, x, drawn(), layer.gate_up, layer.down)

    def in_torch() -> Tensor:
        layer = following()
        return layer._sorted(x, drawn())

    contestants: dict[str, Callable[[], object]] = {"torch": in_torch}
    for path in paths:
        contestants[path] = lambda path=path: compiled(path)
    active = statistics.fmean(int((counts > 0).sum()) for counts in all_counts)
    flops = 2 * rows * preset.top_k * 3 * hidden * width
    return Case(f"experts, {rows} rows", int(active * 3 * hidden * width * 2), flops, contestants)


def attention_case(name: str, preset: Preset, parts: Sequence[tuple[int, int]], paths: Sequence[str]) -> Case:
    counts = [-(-(start + count) // BLOCK) for start, count in parts]
    kv = LayerKV(*(some(sum(counts) * BLOCK, preset.kv_heads, HEAD_DIM) for _ in "kv"))
    firsts = [sum(counts[:index]) for index in range(len(counts))]
    blocks = [range(first, first + count) for first, count in zip(firsts, counts, strict=True)]
    step = StepShape.of([start for start, _ in parts], [count for _, count in parts], blocks, BLOCK)
    tokens = sum(count for _, count in parts)
    positions = torch.cat([torch.arange(start, start + count) for start, count in parts])
    rotation = Rope(HEAD_DIM, 10000.0, CPU).rotation(positions, BF16)
    q, k, v = (some(tokens, heads, HEAD_DIM) for heads in (preset.heads, preset.kv_heads, preset.kv_heads))
    backends: dict[str, AttentionBackend] = {"torch": SDPA(preset.heads, preset.kv_heads, HEAD_DIM, CPU)}
    for path in paths:
        backends[path] = Paged(preset.heads, preset.kv_heads, HEAD_DIM, CPU, path)

    def attended(backend: AttentionBackend) -> Callable[[], object]:
        plan = backend.plan(step)
        ctx = ForwardContext(positions, plan, (kv,), ())
        return lambda: backend.forward(q, k, v, rotation, kv, ctx)

    pairs = sum(count * start + count * (count + 1) // 2 for start, count in parts)
    read = sum(start + count for start, count in parts) * preset.kv_heads * HEAD_DIM * 2 * 2
    return Case(
        name, read, 4 * pairs * preset.heads * HEAD_DIM, {who: attended(each) for who, each in backends.items()}
    )


def norm_case(preset: Preset, rows: int, paths: Sequence[str]) -> Case:
    x, scale = some(rows, preset.hidden), some(preset.hidden)
    return beside_torch(
        f"rms norm, {rows} rows",
        (2 * rows * preset.hidden * 2, 4 * rows * preset.hidden),
        lambda: torch_rms_norm(x, scale, 1e-6),
        lambda path: rms_norm(path, x, scale, 1e-6),
        paths,
    )


def rotary_case(preset: Preset, rows: int, paths: Sequence[str]) -> Case:
    """Norm of heads, rotation and cache write, as they stand before a decode step's attention."""
    heads, kv_heads = preset.heads, preset.kv_heads
    q, k, v = some(rows, heads + 2 * kv_heads, HEAD_DIM).split((heads, kv_heads, kv_heads), dim=1)
    caches = some(rows * BLOCK, kv_heads, HEAD_DIM), some(rows * BLOCK, kv_heads, HEAD_DIM)
    rotation = Rope(HEAD_DIM, 10000.0, CPU).rotation(torch.arange(rows), BF16)
    given = (q, k, v, *caches, torch.arange(rows) * BLOCK, rotation.cos, rotation.sin)
    scales = some(HEAD_DIM), some(HEAD_DIM)
    size = rows * HEAD_DIM * 2 * (2 * heads + 4 * kv_heads)
    return beside_torch(
        f"rotary, {rows} rows",
        (size, 10 * rows * HEAD_DIM * (heads + kv_heads)),
        lambda: rotary_reference.rotary(*given, scales_d=scales, eps=1e-6),
        lambda path: rotary(path, *given, scales_d=scales, eps=1e-6),
        paths,
    )


def routing_cases(preset: Preset, rows: int, paths: Sequence[str]) -> Iterator[Case]:
    """What is around a layer's experts: router, sort, and the weighted sum of their terms."""
    hidden, num, top_k = preset.hidden, preset.experts, preset.top_k
    x, weight = some(rows, hidden), torch.randn(num, hidden)
    ids, weights = route_reference.route(x, weight, top_k, renormalise=True)
    wanted, pairs, _ = sorting_reference.sort_rows(x, ids, 0, num)
    yield beside_torch(
        f"route, {rows} rows",
        (rows * hidden * 2 + num * hidden * 4, 2 * rows * num * hidden),
        lambda: route_reference.route(x, weight, top_k, renormalise=True),
        lambda path: route(path, x, weight, top_k, renormalise=True),
        paths,
    )
    yield beside_torch(
        f"scores, {rows} rows",
        (rows * hidden * 2 + num * hidden * 4, 2 * rows * num * hidden),
        lambda: scores_reference.scores(x, weight),
        lambda path: scores(path, x, weight),
        paths,
    )
    yield beside_torch(
        f"sort, {rows} rows",
        (2 * rows * top_k * hidden * 2, 0),
        lambda: sorting_reference.sort_rows(x, ids, 0, num),
        lambda path: sort_rows(path, x, ids, 0, num),
        paths,
    )
    yield beside_torch(
        f"combine, {rows} rows",
        (rows * (top_k + 1) * hidden * 2, 2 * rows * top_k * hidden),
        lambda: combine_reference.combine(wanted, pairs, weights),
        lambda path: combine(path, wanted, pairs, weights),
        paths,
    )


def beside_torch(
    name: str,
    cost: tuple[int, int],
    reference: Callable[[], object],
    compiled: Callable[[str], object],
    paths: Sequence[str],
) -> Case:
    """An operation that reads no weights worth the name beside its reference. `cost`: bytes moved, and flops."""
    return Case(name, *cost, {"torch": reference} | {path: partial(compiled, path) for path in paths})


def argmax_case(rows: int, vocab: int, paths: Sequence[str]) -> Case:
    logits = torch.randn(rows, vocab)
    return beside_torch(
        f"argmax, {rows} rows of {vocab:,}",
        (rows * vocab * 4, 0),
        lambda: argmax_reference.argmax(logits),
        lambda path: argmax(path, logits),
        paths,
    )


def some(*shape: int) -> Tensor:
    return torch.randn(shape).to(BF16)
