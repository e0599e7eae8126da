"""A coordinator and planners of 8 to 2,048 ranks: `python -m bench.scale --help`.

The coordinator is the real one, in a process of its own, with a real connection to each member; the members are real
only in what they say (bench/scale_members.py). No model, no worker: what a world costs before it computes anything.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.command import console, keep, parser_for, save_figure
from bench.report import Report
from bench.scale_coordinator import Shape
from bench.scale_parts import parts
from bench.scale_world import World, world_of
from moe_serve.base.descriptors import raise_descriptor_limit

Tell = Callable[[str], None]
SPARE_DESCRIPTORS = 64
LIMIT_MS = 20.0
"""No loop may be blocked for longer."""


def main() -> None:
    options = parse()
    with console.status("") as status:
        report = measure(options, status.update)
    show(report)
    keep(report, options.out, draw)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__, label="world")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 128, 512, 2048], help="ranks, one by one")
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--seconds", type=int, default=3, help="of beats that are averaged")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, tell: Tell) -> Report:
    """ValueError where a process may not open as many sockets as the largest world has members."""
    largest, descriptors = max(options.sizes), raise_descriptor_limit()
    if largest * 9 // 8 + SPARE_DESCRIPTORS > descriptors:
        raise ValueError(f"{largest} ranks need more open files than the limit of {descriptors} (ulimit -n); fewer?")
    events: list[dict[str, Any]] = []
    elsewhere, gave_up = [], []
    for ranks in options.sizes:
        shape = Shape(ranks, layers=options.layers, experts=options.experts)
        try:
            asyncio.run(live(shape, tell, options.seconds, events))
        except TimeoutError as error:
            gave_up.append(f"{ranks} ranks: {error}")
        tell(f"{ranks:,} ranks: planning, placing, voting")
        elsewhere.append(parts(shape))
    config = {name: getattr(options, name) for name in ("sizes", "layers", "experts", "seconds")}
    return Report("scale", options.label, config, {"events": events, "elsewhere": elsewhere, "gave_up": gave_up})


async def live(shape: Shape, tell: Tell, seconds: int, events: list[dict[str, Any]]) -> None:
    """Three worlds: one that is drained, one in which all fail alike, one that lives and loses a rank."""
    events += await _drained(shape, tell)
    events += await _failed(shape, tell)
    with world_of(shape, tell) as world:
        world.events = events
        await world.meet()
        await world.lines()
        await world.beats()
        await world.steady(seconds)
        await world.load()
        await world.wake()
        await world.wake_by_all()
        await world.rearrange()
        await world.even_out()
        await world.lose_one()


async def _drained(shape: Shape, tell: Tell) -> list[dict[str, Any]]:
    with world_of(shape, tell) as world:
        await world.meet()
        await world.drain()
    return _last(world)


async def _failed(shape: Shape, tell: Tell) -> list[dict[str, Any]]:
    with world_of(shape, tell) as world:
        await world.meet(ready=False)
        await world.fail_alike()
    return _last(world)


def _last(world: World) -> list[dict[str, Any]]:
    return world.events[-1:]


def show(report: Report) -> None:
    numbers: Any = report.numbers
    table = Table(title=f"what an event takes, {report.label}; * over {LIMIT_MS:g} ms in one step")
    for heading in ("event", "ranks", "in", "out", "MB in", "MB out", "CPU ms", "longest step, turn ms", "solving ms"):
        table.add_column(heading, justify="left" if heading == "event" else "right")
    for row in sorted(numbers["events"], key=lambda row: (row["event"], row["ranks"])):
        table.add_row(
            row["event"],
            *(f"{row[name]:,}" for name in ("ranks", "messages_in", "messages_out")),
            *(f"{row[name] / 1e6:,.3f}" for name in ("bytes_in", "bytes_out")),
            f"{row['cpu_ms']:,.1f}",
            f"{row['step_ms']:.1f}{'*' if row['step_ms'] > LIMIT_MS else ''}, {row['turn_ms']:.1f}",
            f"{row['plan_ms'] + row['shares_ms']:,.0f}",
        )
    Console().print(table)
    other = Table(*numbers["elsewhere"][0], title="elsewhere")
    for row in numbers["elsewhere"]:
        other.add_row(*(f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" for value in row.values()))
    Console().print(other)


def draw(report: Report, path: Path) -> None:
    """Three panels over the number of ranks, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers: Any = report.numbers
    panels = {
        "cpu_ms": "CPU of the coordinator, ms",
        "bytes_out": "bytes from the coordinator",
        "step_ms": "longest step of its loop, ms of CPU",
    }
    names = list(dict.fromkeys(row["event"] for row in numbers["events"]))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(16, 6), layout="constrained")
    for axis, (measure, title) in zip(axes, panels.items(), strict=True):
        for place, name in enumerate(names):
            rows = [row for row in numbers["events"] if row["event"] == name]
            values = [row[measure] or float("nan") for row in rows]
            style = {"color": f"C{place % 10}", "linestyle": "-" if place < 10 else "--"}
            axis.plot([row["ranks"] for row in rows], values, marker="o", markersize=3, label=name, **style)
        axis.set(title=title, xlabel="ranks", xscale="log", yscale="log")
        axis.set_xticks(report.config["sizes"], [f"{ranks:,}" for ranks in _sizes(report)], minor=False)
        axis.minorticks_off()
        axis.grid(visible=True, alpha=0.25)
    axes[-1].axhline(LIMIT_MS, color="black", linewidth=1, linestyle=":")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)
    pyplot.close(figure)


def _sizes(report: Report) -> list[int]:
    sizes: Any = report.config["sizes"]
    return list(sizes)


if __name__ == "__main__":
    main()
