"""One benchmark in two checkouts by turns: `python -m bench.pairs --before PATH --pairs 8 -- bench.offline --alone`.

Machines drift by more than most changes cost, so only what ran beside each other is compared: each pair runs both
checkouts, the first of a pair being the second of the next, and gives one ratio for each number of the report. Their
median and quartiles are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.command import add_checkouts, import_path, keep, parser_for
from bench.report import Report

console = Console(stderr=True)


def main() -> None:
    options = parse()
    before, after = [], []
    for number in track(range(options.pairs), description="pairs", console=console):
        sides = [(options.before, before), (options.after, after)]
        for checkout, numbers in sides if number % 2 == 0 else reversed(sides):
            numbers.append(run(checkout, options.command))
    report = compare(options, before, after)
    show(report)
    keep(report, options.out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__, label="before-after")
    add_checkouts(parser)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--only", type=re.compile, default=".", help="keep numbers whose name matches this")
    parser.add_argument("command", nargs="+", metavar="BENCHMARK", help="a module of bench/ and its options, after --")
    return parser.parse_args(arguments)


def run(checkout: Path, command: Sequence[str]) -> dict[str, float]:
    """Each number of the report that one run in a checkout writes, by its path in it."""
    with tempfile.TemporaryDirectory() as folder:
        told = [sys.executable, "-m", command[0], "--out", folder, "--label", "one", *command[1:]]
        environment = {**os.environ, "PYTHONPATH": import_path(checkout)}
        done = subprocess.run(told, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed in {checkout}:\n{done.stderr[-4000:]}")
        (written,) = Path(folder).glob("*.json")
        return dict(leaves(json.loads(written.read_text(encoding="utf-8"))["numbers"]))


def leaves(numbers: object, path: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested dicts and lists of dicts; a list of repetitions is told by the median beside it."""
    if isinstance(numbers, Mapping):
        for name, value in numbers.items():
            yield from leaves(value, f"{path}.{name}" if path else name)
    elif isinstance(numbers, list):
        for index, value in enumerate(numbers):
            if isinstance(value, Mapping):
                yield from leaves(value, f"{path}[{index}]")
    elif isinstance(numbers, int | float) and not isinstance(numbers, bool):
        yield path, float(numbers)


def compare(
    options: argparse.Namespace, before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]
) -> Report:
    """Medians of both, and of the ratios after / before of the pairs, of every number that all runs have."""
    config = {
        "before": commit_of(options.before),
        "after": commit_of(options.after),
        "pairs": options.pairs,
        "benchmark": " ".join(options.command),
    }
    common = set.intersection(*(set(each) for each in (*before, *after)))
    names = [name for name in before[0] if name in common and re.search(options.only, name)]
    numbers = {
        name: compare_one([each[name] for each in before], [each[name] for each in after])
        for name in names
        if all(each[name] > 0 for each in (*before, *after))
    }
    return Report("pairs", options.label, config, numbers)


def compare_one(before: Sequence[float], after: Sequence[float]) -> dict[str, object]:
    ratios = [new / old for old, new in zip(before, after, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {
        "before": round(statistics.median(before), 4),
        "after": round(statistics.median(after), 4),
        "ratio": round(middle, 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def commit_of(checkout: Path) -> str:
    done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=checkout, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def show(report: Report) -> None:
    table = Table("number", "before", "after", "ratio", "quartiles", title=str(report.config["benchmark"]))
    for name, one in report.numbers.items():
        assert isinstance(one, dict)
        low, high = one["ratio_quartiles"]
        table.add_row(name, str(one["before"]), str(one["after"]), f"{one['ratio']:.3f}", f"{low:.3f} to {high:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
