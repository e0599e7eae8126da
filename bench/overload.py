"""Three times as many requests as the server can answer, with its default limits: `python -m bench.overload --help`.

First its capacity: clients that ask again as soon as they are answered, more of them than there are places. Then an
open loop at several times that rate (requests arrive at random moments, whatever became of the others), until all that
were admitted are answered. Then the same for a while, until all clients hang up at once: is it as before two seconds
later? Every request that was not admitted must have got 503 with Retry-After.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.command import console, keep, parser_for, save_figure
from bench.footprints import Footprints, named, thinned
from bench.http_stream import Address, get_json
from bench.report import Report, percentiles
from bench.serve import Timing, one_request, poisson
from moe_serve.cli.random_model import make_model
from moe_serve.engine.pace import MAX_WAIT_SECONDS
from tests.support.server import Server, serving

WITHIN_SECONDS = 2 * MAX_WAIT_SECONDS
"""p99 of the admitted: twice what an admitted request may wait."""
KV_CACHE = ("--kv-cache-memory-bytes", str(64 << 20))
"""Of each rank; all of it is used before the overload. The pages of a larger one are taken one by one, like a leak."""
AFTER_SECONDS = 2.0
CALM_REQUESTS = 5
NORMAL_TIMES = 3.0
LEAST_NORMAL_SECONDS = 0.5
"""An answer after the load may take three times as long as before it, or this long: more is not normal."""
MAX_GROWTH_MIB = 64.0
"""What all processes together may hold more, once the load has gone, than at full capacity."""


@dataclass(slots=True)
class Phase:
    """Requests of one phase with the moment each was due, in seconds from the phase's beginning."""

    due: list[float] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    @property
    def admitted(self) -> list[Timing]:
        return [timing for timing in self.timings if timing.error is None]

    @property
    def refused(self) -> list[Timing]:
        return [timing for timing in self.timings if _is_refusal(timing)]

    @property
    def failed(self) -> list[Timing]:
        """Neither answered nor refused as it should be."""
        return [timing for timing in self.timings if timing.error is not None and not _is_refusal(timing)]


def _is_refusal(timing: Timing) -> bool:
    return timing.status == 503 and bool(timing.retry_after)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or str(Path(folder, "model"))
        if not options.model:
            make_model(folder=Path(model), preset=options.preset, arch="qwen3_moe", seed=0)
        with serving(model, *KV_CACHE, *options.server_options) as server:
            report = asyncio.run(measure(options, server))
    checks: Any = report.numbers["checks"]
    show(report)
    keep(report, options.out, draw)
    sys.exit(0 if all(check["passed"] for check in checks) else 1)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__, label="tiny", epilog="What follows `--` goes to `moe-serve serve`.")
    parser.add_argument("--model", help="checkpoint folder; a random one if not given")
    parser.add_argument("--preset", default="tiny", choices=["tiny", "small"])
    parser.add_argument("--times", type=float, default=3.0, help="of the capacity that is offered")
    parser.add_argument("--seconds", type=float, default=40.0, help="how long requests arrive")
    parser.add_argument("--capacity-seconds", type=float, default=25.0, help="how long capacity is measured")
    parser.add_argument("--input-len", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--vocab-size", type=int, default=2048, help="prompt tokens lie in [0, vocab-size)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("server_options", nargs="*", metavar="-- SERVER OPTIONS")
    return parser.parse_args(arguments)


async def measure(options: argparse.Namespace, server: Server) -> Report:
    address, generator = Address.parse(server.base_url), random.Random(options.seed)
    config = await get_json(address, "/config")
    places = config["scheduler"]["max_num_seqs"] * config["parallel"]["data_parallel_size"]
    await asyncio.gather(*(one_request(options, address, generator, None) for _ in range(4)))
    calm = await alone(options, address, generator)
    prints = Footprints(named(server.family()))
    sampling = asyncio.create_task(_sample(prints))
    marks: dict[str, float] = {}
    try:
        capacity, full = await capacity_of(options, address, generator, places)
        marks["capacity"] = prints.times[-1]
        console.print(
            f"capacity: {capacity:.1f} requests/s; now {options.times:g} times that for {options.seconds:g} s"
        )
        arrivals = poisson(capacity * options.times, options.seconds, generator)
        over = await offer(options, address, arrivals, generator)
        marks["answered"] = prints.times[-1]
        p99 = percentiles([timing.end for timing in over.admitted])["p99"]
        took = marks["answered"] - marks["capacity"]
        console.print(
            f"{len(over.admitted)} of {len(over.timings)} admitted, p99 {p99} s, all answered in {took:.0f} s"
        )
        arrivals = poisson(capacity * options.times, min(options.seconds, 15.0), generator)
        await offer(options, address, arrivals, generator, hang_up=True)
        await asyncio.sleep(AFTER_SECONDS)
        after = await alone(options, address, generator)
        marks["after"] = prints.times[-1]
        await asyncio.sleep(AFTER_SECONDS)
    finally:
        sampling.cancel()
    numbers = numbers_of(options, prints, marks, capacity, full, over, calm, after)
    asked = ("times", "seconds", "capacity_seconds", "input_len", "output_len", "seed")
    settings = {name: getattr(options, name) for name in asked}
    settings["server"] = {name: config[name] for name in ("parallel", "scheduler", "cache")}
    return Report("overload", options.label, settings, numbers)


async def alone(options: argparse.Namespace, address: Address, generator: random.Random) -> list[Timing]:
    """One request after the other."""
    return [await one_request(options, address, generator, None) for _ in range(CALM_REQUESTS)]


async def capacity_of(
    options: argparse.Namespace, address: Address, generator: random.Random, places: int
) -> tuple[float, Phase]:
    """Answers per second while all places are taken: those that ended in the second half of the time."""
    phase, ends = Phase(), []
    begun = time.perf_counter()
    until = begun + options.capacity_seconds

    async def client() -> None:
        while time.perf_counter() < until:
            timing = await one_request(options, address, generator, None)
            phase.timings.append(timing)
            if timing.error is None:
                ends.append(time.perf_counter() - begun)

    clients = [asyncio.create_task(client()) for _ in range(places + places // 4)]
    await asyncio.sleep(options.capacity_seconds)
    counted = [end for end in ends if end > options.capacity_seconds / 2]
    await asyncio.gather(*clients)
    if not counted:
        raise SystemExit(f"nothing was answered in {options.capacity_seconds:g} s; give --capacity-seconds more")
    return len(counted) / (options.capacity_seconds / 2), phase


async def offer(
    options: argparse.Namespace,
    address: Address,
    arrivals: Sequence[float],
    generator: random.Random,
    *,
    hang_up: bool = False,
) -> Phase:
    """Each request at its moment. `hang_up`: when the last has been sent, all clients go."""
    phase, tasks, started = Phase(list(arrivals)), [], time.perf_counter()
    for moment in arrivals:
        await asyncio.sleep(max(0.0, started + moment - time.perf_counter()))
        tasks.append(asyncio.create_task(one_request(options, address, generator, started + moment)))
    if hang_up:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    else:
        phase.timings = list(await asyncio.gather(*tasks))
    return phase


async def _sample(prints: Footprints) -> None:
    started = time.monotonic()
    while True:
        prints.take(round(time.monotonic() - started, 2))
        await asyncio.sleep(0.5)


def numbers_of(
    options: argparse.Namespace,
    prints: Footprints,
    marks: Mapping[str, float],
    capacity: float,
    full: Phase,
    over: Phase,
    calm: Sequence[Timing],
    after: Sequence[Timing],
) -> dict[str, object]:
    memory = _memory(prints)
    at_capacity = max(mib for at, mib in memory if at <= marks["capacity"])
    left = memory[-1][1]
    ends = [timing.end for timing in over.admitted]
    p99 = percentiles(ends)["p99"] or float("inf")
    normal = max(NORMAL_TIMES * statistics.median(timing.end for timing in calm), LEAST_NORMAL_SECONDS)
    later = [timing.end for timing in after if timing.error is None]
    checks = {
        f"p99 of the admitted is under {WITHIN_SECONDS:g} s": (p99 < WITHIN_SECONDS, f"{p99:.1f} s"),
        "whoever is not admitted gets 503 with Retry-After": (
            not over.failed,
            f"{len(over.refused)} refused, {len(over.failed)} otherwise{_reasons(over.failed)}",
        ),
        "there was an overload": (bool(over.refused), f"{len(over.refused)} of {len(over.timings)} refused"),
        "memory is flat": (
            left - at_capacity < MAX_GROWTH_MIB,
            f"{at_capacity:.0f} MiB at capacity, {max(mib for _, mib in memory):.0f} at most, {left:.0f} left",
        ),
        f"normal {AFTER_SECONDS:g} s after the load has gone": (
            len(later) == len(after) and max(later) < normal,
            f"answers in {', '.join(f'{end:.2f}' for end in later)} s; before in "
            f"{', '.join(f'{timing.end:.2f}' for timing in calm)} s",
        ),
    }
    return {
        "capacity_requests_per_second": round(capacity, 2),
        "at_capacity_ms": {"e2e": percentiles([timing.end for timing in full.admitted], 1000)},
        "offered": len(over.timings),
        "admitted": len(over.admitted),
        "refused": len(over.refused),
        "failed": len(over.failed),
        "ttft_ms": percentiles([timing.first for timing in over.admitted], 1000),
        "after_first_token_ms": percentiles([timing.end - timing.first for timing in over.admitted], 1000),
        "e2e_ms": percentiles(ends, 1000),
        "refused_after_ms": percentiles([timing.end for timing in over.refused], 1000),
        "generator_lateness_ms": percentiles([timing.lateness for timing in over.timings], 1000),
        "checks": [{"name": name, "passed": passed, "found": found} for name, (passed, found) in checks.items()],
        "marks_seconds": dict(marks),
        "timeline": {
            "memory_mib": [list(point) for point in zip(*map(thinned, zip(*memory, strict=True)), strict=True)],
            "admitted": _points(over, over.admitted),
            "refused": _points(over, over.refused),
        },
    }


def _reasons(timings: Sequence[Timing]) -> str:
    return "".join(f"; {reason}" for reason in sorted({str(timing.error) for timing in timings})[:3])


def _memory(prints: Footprints) -> list[tuple[float, float]]:
    """Of all processes together, in MiB."""
    values = [prints.series(name, "uss_mib")[1] for name in prints.processes if name not in prints.gone]
    return [(at, round(sum(each), 1)) for at, each in zip(prints.times, zip(*values, strict=False), strict=False)]


def _points(phase: Phase, among: Sequence[Timing], most: int = 600) -> list[list[float]]:
    """[due, first token, end] of some, in seconds."""
    chosen = {id(timing) for timing in among[:: max(1, len(among) // most)]}
    pairs = zip(phase.due, phase.timings, strict=True)
    return [[round(due, 2), round(t.first, 2), round(t.end, 2)] for due, t in pairs if id(t) in chosen]


def show(report: Report) -> None:
    numbers: Any = report.numbers
    table = Table("", "check", "found", title=f"{numbers['capacity_requests_per_second']} requests/s answered at most")
    for check in numbers["checks"]:
        table.add_row("ok" if check["passed"] else "FAILED", check["name"], check["found"])
    console.print(table)


def draw(report: Report, path: Path) -> None:
    """Each request by when it was due: how long until its first token, its end, or its refusal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timeline: Any = report.numbers["timeline"]
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for index, name, colour in ((2, "whole answer", "tab:blue"), (1, "first token", "tab:green")):
        points = timeline["admitted"]
        panels[0].plot([p[0] for p in points], [p[index] for p in points], ".", markersize=3, color=colour, label=name)
    points = timeline["refused"]
    panels[0].plot([p[0] for p in points], [p[2] for p in points], ".", markersize=3, color="tab:red", label="refused")
    panels[0].axhline(WITHIN_SECONDS, color="black", linewidth=0.8, linestyle="--")
    panels[0].set(title="Each request at overload", xlabel="due, seconds", ylabel="seconds until", ylim=(0, None))
    panels[0].legend()
    panels[1].plot(*zip(*timeline["memory_mib"], strict=True), color="tab:purple")
    for name, at in dict(report.numbers["marks_seconds"]).items():  # type: ignore[call-overload]
        panels[1].axvline(at, color="black", linewidth=0.8, linestyle="--")
        panels[1].annotate(name, (at, 0), rotation=90, va="bottom", ha="right", fontsize=8)
    panels[1].set(title="Memory of all processes (USS), MiB", xlabel="seconds", ylim=(0, None))
    for panel in panels:
        panel.grid(visible=True, alpha=0.25)
    save_figure(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
