"""Every compiled operation beside torch's own, by turns, and beside the machine's limits: `python -m bench.kernels`.

Limits: what a plain sum over more memory than caches hold reads per second, and what large products of torch's compute.
An operation that reads weights reads other ones each time, as a step does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import TypeVar

import torch
from moe_kernels.argmax import reference as argmax_reference
from moe_kernels.argmax.argmax import argmax
from moe_kernels.experts.experts import experts
from moe_kernels.linear.linear import linear
from moe_kernels.norm.norm import rms_norm
from moe_kernels.paths import available
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from bench.command import keep, parser_for
from bench.report import Report
from moe_serve.cli.random_model import PRESETS, Preset
from moe_serve.model.attention.base import AttentionBackend, StepShape
from moe_serve.model.attention.paged import Paged
from moe_serve.model.attention.sdpa import SDPA
from moe_serve.model.context import LayerKV
from moe_serve.model.layers.norm import rms_norm as torch_rms_norm
from moe_serve.model.layers.rope import Rope
from moe_serve.model.moe.experts import Experts

ROWS = (1, 4, 16, 128, 512)
RING_BYTES = 1 << 30
"""Of weights that are used in turn: more than caches hold."""
HEAD_DIM, BLOCK = 64, 16
T = TypeVar("T")
console = Console(stderr=True)
CPU, BF16 = torch.device("cpu"), torch.bfloat16


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one size: what it must read, what it must compute, and who can do it."""

    name: str
    read_bytes: int
    flops: int
    contestants: dict[str, Callable[[], object]]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    report = measure(options)
    show(report)
    keep(report, options.out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    parser.add_argument("--preset", default="small", choices=list(PRESETS))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--paths", nargs="+", default=available()[:1], choices=available())
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=7, help="of each, after one that does not count")
    parser.add_argument("--seconds", type=float, default=0.1, help="of one turn, at least one pass")
    return parser.parse_args(arguments)


@torch.inference_mode()
def measure(options: argparse.Namespace) -> Report:
    preset = PRESETS[options.preset]
    numbers: dict[str, object] = {"limits": limits(options)}
    for case in track(list(cases(preset, options)), description="operations", console=console):
        numbers[case.name] = compare(case, options)
    config = {
        "preset": options.preset,
        "paths": list(options.paths),
        "threads": options.threads,
        "turns": options.turns,
    }
    return Report("kernels", options.label or f"{options.preset}-{options.threads}", config, numbers)


def compare(case: Case, options: argparse.Namespace) -> dict[str, object]:
    """Median seconds of each contestant over its turns, and its ratio to torch in the same turn."""
    turns: list[dict[str, float]] = []
    for turn in range(options.turns + 1):
        order = list(case.contestants)
        turns.append(
            {name: passes(case.contestants[name], options.seconds) for name in order[:: 1 if turn % 2 else -1]}
        )
    found: dict[str, object] = {}
    for name in case.contestants:
        seconds = statistics.median(turn[name] for turn in turns[1:])
        found[name] = {
            "seconds": seconds,
            "gigabytes_per_second": case.read_bytes / seconds / 1e9,
            "gigaflops": case.flops / seconds / 1e9,
            "times_as_fast_as_torch": statistics.median(turn["torch"] / turn[name] for turn in turns[1:]),
        }
    return found


def passes(work: Callable[[], object], seconds: float) -> float:
    """Median seconds of one pass."""
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while not taken or time.perf_counter() < until:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def limits(options: argparse.Namespace) -> dict[str, float]:
    memory = torch.ones(RING_BYTES // 4)
    reading = min(passes(memory.sum, options.seconds) for _ in range(options.turns))
    found = {"gigabytes_per_second": RING_BYTES / reading / 1e9}
    for name, dtype in (("float32", torch.float32), ("bfloat16", BF16)):
        square = torch.ones(2048, 2048, dtype=dtype)
        computing = min(passes(partial(torch.mm, square, square), options.seconds) for _ in range(options.turns))
        found[f"{name}_gigaflops"] = 2 * 2048**3 / computing / 1e9
    return found


def cases(preset: Preset, options: argparse.Namespace) -> Iterator[Case]:
    for rows in options.rows:
        yield linear_case(preset, rows, options.paths)
    for rows in options.rows:
        yield experts_case(preset, rows, options.paths)
    for name, sequences in (
        ("16 x 1 of 200", [(199, 1)] * 16),
        ("1 x 1 of 4,000", [(3999, 1)]),
        ("512 of 512", [(0, 512)]),
    ):
        yield attention_case(f"attention, {name}", preset, sequences, options.paths)
    for rows in options.rows:
        yield norm_case(preset, rows, options.paths)
    for rows, vocab in ((1, 151_936), (16, 151_936), (32, 32_000), (32, 512)):
        yield argmax_case(rows, vocab, options.paths)


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
        return lambda: backend.forward(q, k, v, rotation, kv, plan)

    pairs = sum(count * start + count * (count + 1) // 2 for start, count in parts)
    read = sum(start + count for start, count in parts) * preset.kv_heads * HEAD_DIM * 2 * 2
    return Case(
        name, read, 4 * pairs * preset.heads * HEAD_DIM, {who: attended(each) for who, each in backends.items()}
    )


def norm_case(preset: Preset, rows: int, paths: Sequence[str]) -> Case:
    x, scale = some(rows, preset.hidden), some(preset.hidden)
    contestants: dict[str, Callable[[], object]] = {"torch": lambda: torch_rms_norm(x, scale, 1e-6)}
    for path in paths:
        contestants[path] = lambda path=path: rms_norm(path, x, scale, 1e-6)
    return Case(f"rms norm, {rows} rows", 2 * rows * preset.hidden * 2, 4 * rows * preset.hidden, contestants)


def argmax_case(rows: int, vocab: int, paths: Sequence[str]) -> Case:
    logits = torch.randn(rows, vocab)
    contestants: dict[str, Callable[[], object]] = {"torch": lambda: argmax_reference.argmax(logits)}
    for path in paths:
        contestants[path] = lambda path=path: argmax(path, logits)
    return Case(f"argmax, {rows} rows of {vocab:,}", rows * vocab * 4, 0, contestants)


def some(*shape: int) -> Tensor:
    return torch.randn(shape).to(BF16)


def show(report: Report) -> None:
    table = Table("operation", "by", "us", "GB/s", "GFLOP/s", "x torch")
    for name, found in report.numbers.items():
        if name == "limits":
            continue
        assert isinstance(found, dict)
        for who, each in found.items():
            numbers = (each["gigabytes_per_second"], each["gigaflops"], each["times_as_fast_as_torch"])
            table.add_row(name, who, f"{each['seconds'] * 1e6:,.0f}", *(f"{number:.1f}" for number in numbers))
    console.print(table)
    console.print(report.numbers["limits"])


if __name__ == "__main__":
    main()
