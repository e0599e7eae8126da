"""All-to-all backends of CPU ranks by turns: `python -m bench.all2all --ranks 2 4 --rows 1 16 256`.

Seconds of one layer's way out and home, with experts that give back what they get, over ranks, rows and skew; the bytes
that leave a rank beside those that must. And without a backend around it: rows and votes by gloo and shared memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.all2all_rank import HOST, TOKEN, Sizes, run
from bench.command import keep, parser_for, save_figure
from bench.report import Report, spread
from moe_serve.model.all2all.limits import backends_for
from moe_serve.parallel.store import open_store

LIMIT_SECONDS = 600.0
COLOURS = {"shm": "tab:red", "allgather_reducescatter": "tab:blue", "torch_a2a": "tab:green"}
console = Console(stderr=True)


def main() -> None:
    options = parse()
    report = measure(options)
    show(report)
    keep(report, options.out, draw)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__, label="cpu")
    parser.add_argument("--backends", nargs="+", default=backends_for("cpu"), choices=backends_for("cpu"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="on this machine, a thread each")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024], help="that each rank brings")
    parser.add_argument("--skew", type=float, nargs="+", default=[0.0, 1.0], help="expert i as often as 1 / i^SKEW")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--turns", type=int, default=5, help="of each backend in each case")
    parser.add_argument("--seconds", type=float, default=0.02, help="of each turn")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> Report:
    sizes = Sizes(
        backends=tuple(options.backends),
        rows=tuple(options.rows),
        skews=tuple(options.skew),
        hidden=options.hidden,
        top_k=options.top_k,
        experts=options.experts,
        dtype=options.dtype,
        turns=options.turns,
        seconds=options.seconds,
    )
    numbers = {}
    for ranks in options.ranks:
        console.print(f"{ranks} ranks")
        numbers[str(ranks)] = in_microseconds(run_ranks(ranks, sizes))
    config = {name: getattr(sizes, name) for name in ("hidden", "top_k", "experts", "dtype", "turns", "seconds")}
    return Report("all2all", options.label, config, numbers)


def run_ranks(count: int, sizes: Sizes) -> dict[str, Any]:
    """What rank 0 measured. A rank that fails raises here; the others end by their groups' time limit."""
    store, port = open_store(HOST, 0, is_master=True, token=TOKEN)
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(run, rank, count, port, sizes) for rank in range(count)]
        found = [future.result(LIMIT_SECONDS) for future in futures]
    del store
    return found[0]


def in_microseconds(found: dict[str, Any]) -> dict[str, Any]:
    def microseconds(seconds: dict[str, list[float]]) -> dict[str, object]:
        return {name: spread([1e6 * each for each in turns]) for name, turns in seconds.items()}

    cases = [
        {
            **{name: case[name] for name in ("rows", "skew")},
            "needed_bytes": case["needed"],
            "moved_bytes": case["moved"],
            "us": microseconds(case["seconds"]),
        }
        for case in found["cases"]
    ]
    return {"cases": cases, "plain_us": {what: microseconds(ways) for what, ways in found["plain"].items()}}


def show(report: Report) -> None:
    numbers: Any = report.numbers
    for ranks, found in numbers.items():
        names = list(found["cases"][0]["us"])
        table = Table("rows", "skew", *names, title=f"{ranks} ranks: us out and home (bytes moved / needed)")
        for case in found["cases"]:
            needed = max(case["needed_bytes"], 1)
            cells = [f"{case['us'][name]['median']:.0f} ({case['moved_bytes'][name] / needed:.1f})" for name in names]
            table.add_row(str(case["rows"]), f"{case['skew']:g}", *cells)
        console.print(table)
        for what, ways in found["plain_us"].items():
            gloo, shared = (ways[way]["median"] for way in ("gloo", "shared memory"))
            console.print(f"{what}: gloo {gloo} us, shared memory {shared} us ({gloo / shared:.1f} times as fast)")


def draw(report: Report, path: Path) -> None:
    """Time over rows for each number of ranks, experts asked for evenly; and bytes beside those that must move."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers: Any = report.numbers
    figure, panels = pyplot.subplots(1, len(numbers) + 1, figsize=(5 * (len(numbers) + 1), 4), layout="constrained")
    for panel, (ranks, found) in zip(panels, numbers.items(), strict=False):
        for name, colour in colours(found).items():
            cases = [case for case in found["cases"] if case["skew"] == found["cases"][0]["skew"]]
            rows = [case["rows"] for case in cases]
            panel.plot(rows, [case["us"][name]["median"] for case in cases], "o-", color=colour, label=name)
        panel.set(
            title=f"{ranks} ranks", xlabel="rows of each rank", ylabel="us out and home", xscale="log", yscale="log"
        )
        panel.legend(fontsize=8)
    _draw_bytes(panels[-1], numbers)
    for panel in panels:
        panel.grid(visible=True, alpha=0.25)
    save_figure(figure, path)
    pyplot.close(figure)


def _draw_bytes(panel: Any, numbers: dict[str, Any]) -> None:
    """Medians over the cases."""
    for place, found in enumerate(numbers.values()):
        names = colours(found)
        for index, (name, colour) in enumerate(names.items()):
            ratios = [case["moved_bytes"][name] / max(case["needed_bytes"], 1) for case in found["cases"]]
            label = name if place == 0 else None
            left = place + (index + 0.5) / (len(names) + 1) - 0.5
            panel.bar(left, statistics.median(ratios), width=0.9 / (len(names) + 1), color=colour, label=label)
    panel.axhline(1, color="black", linewidth=0.8, linestyle="--")
    panel.set(title="Bytes that leave a rank, of those that must", xticks=range(len(numbers)))
    panel.set_xticklabels([f"{ranks} ranks" for ranks in numbers])
    panel.legend(fontsize=8)


def colours(found: dict[str, Any]) -> dict[str, str]:
    spare = iter(("tab:gray", "tab:olive", "tab:brown"))
    return {name: COLOURS.get(name) or next(spare) for name in found["cases"][0]["us"]}


if __name__ == "__main__":
    main()
