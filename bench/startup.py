"""From the command to the curl line: `python -m bench.startup --help`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench.command import keep, parser_for
from bench.report import Report
from bench.started_server import started


def main() -> None:
    options = parse()
    numbers = {}
    for dp in options.dp:
        seconds = [time_to_ready(options.model, dp) for _ in range(options.repetitions)]
        numbers[f"dp{dp}"] = {"median_s": round(statistics.median(seconds), 2), "all_s": seconds}
    report = Report("startup", options.label, {"repetitions": options.repetitions, "model": options.label}, numbers)
    show(report)
    keep(report, options.out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__, label="tiny")
    parser.add_argument("--model", help="checkpoint folder; a random tiny one, made before the clock starts")
    parser.add_argument("--dp", type=int, nargs="+", default=[1, 2, 4], help="data-parallel sizes, one by one")
    parser.add_argument("--repetitions", type=int, default=3)
    return parser.parse_args(arguments)


def time_to_ready(model: str | None, dp: int) -> float:
    """Seconds from starting the process to its last line."""
    with started(model, ["-dp", str(dp), "-ep"] if dp > 1 else []) as server:
        return round(time.monotonic() - server.begun, 2)


def show(report: Report) -> None:
    table = Table("engines", "median s", "all", title=f"from the command to the curl line, {report.label}")
    for name, figures in report.numbers.items():
        assert isinstance(figures, dict)
        table.add_row(name, f"{figures['median_s']:.2f}", str(figures["all_s"]))
    Console().print(table)


if __name__ == "__main__":
    main()
