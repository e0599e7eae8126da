"""Do answers stall while experts move? `python -m bench.eplb_stall --help`.

Streams run all the time. Every other stretch of time, one rearrangement after the other is applied (random valid
placements, which move far more than a balancer would); the stretches between are the same server at rest. A gap
between two tokens counts as "during" if it overlaps a rearrangement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.command import keep, parser_for, save_figure
from bench.domains import domains, prompts_of
from bench.http_stream import Address, get_json, post_json
from bench.report import Report, percentiles
from bench.started_server import started
from bench.steady_load import Gap, SteadyLoad

SETTLE_SECONDS = 60.0
ASK_SECONDS = 0.4
BIN_SECONDS = 0.05
console = Console(stderr=True)


def main() -> None:
    options = parse()
    eplb = {"policy": "static", "num_redundant_experts": options.redundant, "step_interval": 1_000_000}
    if options.max_bytes_per_step:
        eplb["max_bytes_per_step"] = options.max_bytes_per_step
    server = ["-dp", str(options.dp), "-ep", "--enable-eplb", "--eplb-config", json.dumps(eplb)]
    with started(options.model, server) as running:
        report = asyncio.run(measure(options, running.address))
    show(report)
    keep(report, options.out, draw)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__, label="default-model")
    parser.add_argument("--model", help="checkpoint folder; a random tiny one if not given")
    parser.add_argument("--dp", type=int, default=2, help="data-parallel ranks")
    parser.add_argument("--redundant", type=int, default=4, help="redundant experts")
    parser.add_argument("--max-bytes-per-step", type=int, help="as in --eplb-config; the server's default if not given")
    parser.add_argument("--clients", type=int, default=8, help="streams at a time")
    parser.add_argument("--output-len", type=int, default=96)
    parser.add_argument("--stretch", type=float, default=8.0, help="seconds at rest, then as many with rearrangements")
    parser.add_argument("--stretches", type=int, default=4, help="pairs of them")
    return parser.parse_args(arguments)


async def measure(options: argparse.Namespace, address: Address) -> Report:
    load = SteadyLoad(address, options.clients, options.output_len, prompts_of(domains()[0], 200))
    load.start()
    await asyncio.sleep(options.stretch / 2)  # warm-up
    started_at = time.monotonic()
    spans: list[tuple[float, float]] = []
    for _ in range(options.stretches):
        await asyncio.sleep(options.stretch)
        until = time.monotonic() + options.stretch
        while time.monotonic() < until:
            spans.append(await rearrange(address))
            load.check()
        console.print(f"{len(spans)} rearrangements, {len(load.gaps)} gaps between tokens")
    ended_at = time.monotonic()
    await load.stop()
    history = [entry for entry in (await get_json(address, "/eplb"))["history"] if "commit_seconds" in entry]
    gaps = [gap for gap in load.gaps if started_at <= gap.end <= ended_at]
    config = {
        name: getattr(options, name) for name in ("dp", "redundant", "clients", "output_len", "stretch", "stretches")
    }
    return Report("eplb_stall", options.label, config, numbers(gaps, spans, history, started_at))


async def rearrange(address: Address) -> tuple[float, float]:
    """Apply a random placement and wait until it is served; from when to when, by the server's own history.

    Asked seldom: each question costs the server's machine some of what is being measured.
    """
    begun = time.monotonic()
    await post_json(address, "/eplb/apply", {"policy": "shuffle"})
    while time.monotonic() < begun + SETTLE_SECONDS:
        await asyncio.sleep(ASK_SECONDS)
        state = await get_json(address, "/eplb")
        if not state["in_flight"]:
            return begun, begun + state["history"][-1]["seconds"]
    raise SystemExit(f"a rearrangement was not done in {SETTLE_SECONDS:g} s")


def numbers(
    gaps: Sequence[Gap], spans: Sequence[tuple[float, float]], history: Sequence[dict[str, Any]], zero: float
) -> dict[str, Any]:
    """Percentiles of the gaps at rest and during rearrangements, their ratios, and what the rearrangements took."""
    during = [gap for gap in gaps if any(gap.end > begin and gap.end - gap.seconds < end for begin, end in spans)]
    marked = set(map(id, during))
    rest = [gap for gap in gaps if id(gap) not in marked]
    sides = {
        name: percentiles([gap.seconds for gap in side], 1000)
        | {"max": round(1000 * max(gap.seconds for gap in side), 3), "gaps": len(side)}
        for name, side in (("at_rest_ms", rest), ("during_ms", during))
    }
    ratios = {p: round(sides["during_ms"][p] / sides["at_rest_ms"][p], 3) for p in ("p50", "p90", "p99", "max")}
    return {
        **sides,
        "ratio": ratios,
        "rearrangements": len(spans),
        "moved_experts": sum(entry["moved_experts"] for entry in history),
        "moved_bytes": sum(entry["moved_bytes"] for entry in history),
        "longest_commit_ms": round(1000 * max(entry["commit_seconds"] for entry in history), 3),
        "rearrangement_ms": percentiles([end - begin for begin, end in spans], 1000),
        "timeline": {
            "longest_gaps_ms": longest(gaps, zero),
            "rearrangements": [[round(begin - zero, 4), round(end - zero, 4)] for begin, end in spans],
        },
    }


def longest(gaps: Sequence[Gap], zero: float) -> list[list[float]]:
    """[seconds, milliseconds] of the longest gap that ended in each twentieth of a second."""
    found: dict[int, float] = {}
    for gap in gaps:
        place = int((gap.end - zero) / BIN_SECONDS)
        found[place] = max(found.get(place, 0.0), gap.seconds)
    return [[round(place * BIN_SECONDS, 2), round(1000 * seconds, 2)] for place, seconds in sorted(found.items())]


def show(report: Report) -> None:
    table = Table(title=f"gaps between tokens, {report.config['clients']} streams, dp={report.config['dp']}")
    for name in ("", "p50 ms", "p90 ms", "p99 ms", "max ms", "gaps"):
        table.add_column(name, justify="left" if not name else "right")
    for name, title in (("at_rest_ms", "at rest"), ("during_ms", "while experts move")):
        side = report.numbers[name]
        assert isinstance(side, dict)
        table.add_row(title, *(f"{side[key]:.1f}" for key in ("p50", "p90", "p99", "max")), str(side["gaps"]))
    ratio = report.numbers["ratio"]
    assert isinstance(ratio, dict)
    table.add_row("ratio", *(f"{ratio[key]:.2f}" for key in ("p50", "p90", "p99", "max")), "")
    Console().print(table)


def draw(report: Report, path: Path) -> None:
    """The longest gaps over time, rearrangements shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timeline = report.numbers["timeline"]
    assert isinstance(timeline, dict)
    figure, panel = pyplot.subplots(figsize=(10, 4), layout="constrained")
    for begin, end in timeline["rearrangements"]:
        panel.axvspan(begin, end, color="tab:orange", alpha=0.25, linewidth=0)
    times, gaps = zip(*timeline["longest_gaps_ms"], strict=True)
    panel.plot(times, gaps, ".", markersize=3, color="tab:blue")
    panel.set(
        title=f"Longest gap between tokens in each 50 ms; shaded: {report.numbers['rearrangements']} rearrangements",
        xlabel="seconds",
        ylabel="milliseconds",
        yscale="log",
    )
    for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
        axis("{x:g}")
    panel.grid(visible=True, alpha=0.25)
    save_figure(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
