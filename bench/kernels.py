"""Every compiled operation beside torch's own, by turns, and beside the machine's limits: `python -m bench.kernels`.

Limits: what a plain sum over more memory than caches hold reads per second, and what large products of torch's compute.
An operation that reads weights reads other ones each time, as a step does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from moe_kernels.paths import available
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.command import keep, parser_for
from bench.kernel_cases import RING_BYTES, Case, cases
from bench.report import Report
from moe_serve.cli.random_model import PRESETS

ROWS = (1, 4, 16, 128, 512)
console = Console(stderr=True)


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
    for case in track(list(cases(preset, options.rows, options.paths)), description="operations", console=console):
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
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        square = torch.ones(2048, 2048, dtype=dtype)
        computing = min(passes(partial(torch.mm, square, square), options.seconds) for _ in range(options.turns))
        found[f"{name}_gigaflops"] = 2 * 2048**3 / computing / 1e9
    return found


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
