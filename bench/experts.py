"""The experts of an MoE layer in two checkouts by turns: `python -m bench.experts --before PATH --preset small`.

From the router's choice to the weighted sum, without exchange between ranks, for several numbers of rows. Both stay
loaded, and one sleeps while the other has its turn; what they give is compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.command import add_checkouts, import_path, keep, parser_for
from bench.pairs import commit_of, compare_one, show
from bench.report import Report
from moe_serve.cli.random_model import PRESETS
from moe_serve.world.member import spin_environment

ROWS = (1, 2, 4, 8, 16, 32, 128, 512, 2048)
LAYER_BYTES = 1 << 30
"""Of the layers that are used in turn: more than caches hold."""
MAX_LAYERS = 24
console = Console(stderr=True)


class Contestant:
    """A child that has the layers of one checkout, and computes when it is told to."""

    def __init__(self, checkout: Path, sizes: dict[str, object]) -> None:
        child = str(Path(__file__).with_name("experts_contestant.py"))
        self._process = subprocess.Popen(
            [sys.executable, "-P", child, json.dumps(sizes)],
            cwd=checkout,
            env={**os.environ, **spin_environment(), "PYTHONPATH": import_path(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self, **order: int) -> tuple[float, str]:
        """The median of its passes in seconds, and a checksum of all outputs."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a contestant ended with code {self._process.wait()}")
        answer = json.loads(line)
        return statistics.median(answer["seconds"]), answer["digest"]

    def close(self) -> None:
        self._process.communicate()  # closes both pipes


def main() -> None:
    options = parse()
    report = measure(options)
    show(report)
    keep(report, options.out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    add_checkouts(parser)
    parser.add_argument("--preset", default="small", choices=list(PRESETS))
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each contestant")
    parser.add_argument("--turns", type=int, default=5, help="of each, after one that does not count")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> Report:
    sizes = sizes_of(options)
    sides = [Contestant(checkout, sizes) for checkout in (options.before, options.after)]
    numbers: dict[str, object] = {}
    equal: dict[str, int] = {}
    for rows in options.rows:
        turns = [alternate(sides, turn, rows) for turn in range(options.turns + 1)][1:]
        name = f"{rows} rows, passes per second"
        numbers[name] = compare_one(*([1 / turn[side][0] for turn in turns] for side in (0, 1)))
        equal[str(rows)] = sum(before[1] == after[1] for before, after in turns)
    for side in sides:
        side.close()
    config = {
        "benchmark": f"experts of {options.preset} in {options.dtype}, {options.threads} threads",
        "before": commit_of(options.before),
        "after": commit_of(options.after),
        "turns": options.turns,
        "turns_with_equal_bits": equal,
        **sizes,
    }
    return Report("experts", options.label or f"{options.preset}-{options.dtype}-{options.threads}", config, numbers)


def sizes_of(options: argparse.Namespace) -> dict[str, object]:
    preset = PRESETS[options.preset]
    layer = preset.experts * 3 * preset.hidden * preset.width * (2 if options.dtype == "bfloat16" else 4)
    sizes: dict[str, Any] = {name: getattr(preset, name) for name in ("experts", "top_k", "hidden", "width")}
    layers = min(MAX_LAYERS, max(2, LAYER_BYTES // layer))
    return {**sizes, "dtype": options.dtype, "threads": options.threads, "layers": layers}


def alternate(sides: Sequence[Contestant], turn: int, rows: int) -> list[tuple[float, str]]:
    """What both gave in a turn, [before, after]; who goes first changes."""
    passes = max(3, 24 // rows)
    given = {side: sides[side].turn(rows=rows, passes=passes, seed=turn) for side in ((0, 1) if turn % 2 else (1, 0))}
    return [given[0], given[1]]


if __name__ == "__main__":
    main()
