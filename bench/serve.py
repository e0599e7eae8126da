"""Latency of a server under open-loop load: `python -m bench.serve --help`.

Requests arrive at random (Poisson) moments at given rates, whether or not earlier ones have been answered, as the
world's do. Times count from the moment a request was due, so a late load generator cannot flatter the server; how late
it was is reported. Every request streams; tokens that arrive in one event count as one.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from bench.command import keep, parser_for, save_figure
from bench.http_stream import Address, StreamFailed, get_json, post_events
from bench.report import PERCENTILES, Report, percentiles
from bench.started_server import started

MEASURES = {"ttft_ms": "time to first token", "itl_ms": "between two tokens", "e2e_ms": "whole answer"}
console = Console(stderr=True)


@dataclass(slots=True)
class Timing:
    """One request, in seconds from the moment it was due. `status` and `retry_after` of a refusal."""

    lateness: float
    first: float = 0.0
    gaps: list[float] = field(default_factory=list)
    end: float = 0.0
    num_tokens: int = 0
    error: str | None = None
    status: int | None = None
    retry_after: float | None = None


def main() -> None:
    options = parse()
    if options.url:
        report = asyncio.run(measure(options, Address.parse(options.url)))
    else:
        with started(options.model, options.server_options, preset=options.preset) as server:
            report = asyncio.run(measure(options, server.address))
    show(report)
    keep(report, options.out, draw)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(
        __doc__,
        label="tiny",
        epilog="What follows `--` goes to `moe-serve serve`: python -m bench.serve --rates 1 2 -- -dp 2 -ep",
    )
    parser.add_argument("--url", help="a running server, as http://host:port; one is started if not given")
    parser.add_argument("--model", help="checkpoint folder for the server that is started; a random one if not given")
    parser.add_argument("--preset", default="tiny", choices=["tiny", "small"])
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 2, 4, 8], help="requests per second, one by one")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long requests arrive at each rate")
    parser.add_argument("--warm-up", type=int, default=4, help="requests before the first rate, not counted")
    parser.add_argument("--input-len", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--vocab-size", type=int, default=2048, help="prompt tokens lie in [0, vocab-size)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("server_options", nargs="*", metavar="-- SERVER OPTIONS")
    return parser.parse_args(arguments)


async def measure(options: argparse.Namespace, address: Address) -> Report:
    """All rates, one after the other, each until its last answer."""
    generator = random.Random(options.seed)
    await asyncio.gather(*(one_request(options, address, generator, None) for _ in range(options.warm_up)))
    numbers = []
    for rate in options.rates:
        arrivals = poisson(rate, options.seconds, generator)
        console.print(f"{rate:g} requests/s: {len(arrivals)} requests in {options.seconds:g} s ...")
        started = time.perf_counter()
        timings = await offer(options, address, arrivals, generator)
        numbers.append({"rate": rate} | summary(timings, time.perf_counter() - started))
    config = {name: getattr(options, name) for name in ("seconds", "input_len", "output_len", "seed")}
    config["server"] = await _server_config(address)
    return Report("serve", options.label, config, {"rates": numbers})


def poisson(rate: float, seconds: float, generator: random.Random) -> list[float]:
    """Moments of arrival, in seconds from the start; at least one."""
    moments = [generator.expovariate(rate)]
    while moments[-1] < seconds:
        moments.append(moments[-1] + generator.expovariate(rate))
    return moments[:-1] or [0.0]


async def offer(
    options: argparse.Namespace, address: Address, arrivals: Sequence[float], generator: random.Random
) -> list[Timing]:
    """Send each request at its moment, whatever became of the others."""
    started = time.perf_counter()
    tasks = []
    for moment in arrivals:
        await asyncio.sleep(max(0.0, started + moment - time.perf_counter()))
        tasks.append(asyncio.create_task(one_request(options, address, generator, started + moment)))
    return list(await asyncio.gather(*tasks))


async def one_request(
    options: argparse.Namespace, address: Address, generator: random.Random, due: float | None
) -> Timing:
    due = time.perf_counter() if due is None else due
    prompt = [generator.randrange(options.vocab_size) for _ in range(options.input_len)]
    body = {
        "prompt": prompt,
        "max_tokens": options.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    timing = Timing(time.perf_counter() - due)
    try:
        await _follow(post_events(address, "/v1/completions", msgspec.json.encode(body)), timing, due)
    except StreamFailed as error:
        timing.error, timing.status, timing.retry_after = str(error), error.status, error.retry_after
        timing.end = time.perf_counter() - due
    except OSError as error:
        timing.error = str(error)
    return timing


async def _follow(events: AsyncIterator[dict[str, Any]], timing: Timing, due: float) -> None:
    last = None
    async for event in events:
        now = time.perf_counter()
        if "error" in event:
            raise StreamFailed(str(event["error"]))
        if event.get("usage"):
            timing.num_tokens = event["usage"]["completion_tokens"]
        if not event["choices"]:
            continue
        if last is None:
            timing.first = now - due
        else:
            timing.gaps.append(now - last)
        last = now
    timing.end = time.perf_counter() - due


def summary(timings: Sequence[Timing], seconds: float) -> dict[str, object]:
    """What one rate gave; times in milliseconds."""
    good = [timing for timing in timings if timing.error is None]
    tokens = sum(timing.num_tokens for timing in good)
    return {
        "requests": len(timings),
        "failed": len(timings) - len(good),
        "requests_per_second": round(len(good) / seconds, 3),
        "output_tokens_per_second": round(tokens / seconds, 1),
        "ttft_ms": percentiles([timing.first for timing in good], 1000),
        "itl_ms": percentiles([gap for timing in good for gap in timing.gaps], 1000),
        "e2e_ms": percentiles([timing.end for timing in good], 1000),
        "generator_lateness_ms": percentiles([timing.lateness for timing in timings], 1000),
        "errors": sorted({timing.error for timing in timings if timing.error is not None})[:5],
    }


async def _server_config(address: Address) -> dict[str, object]:
    """What a moe-serve server says of itself; without folders, which belong to one machine."""
    try:
        config = await get_json(address, "/config")
    except (OSError, StreamFailed):
        return {}
    config["model"]["model"] = Path(config["model"]["model"]).name
    config["model"]["served_model_name"] = Path(config["model"]["served_model_name"]).name
    return {name: config[name] for name in ("model", "parallel", "cache", "scheduler")}


def show(report: Report) -> None:
    sizes = f"{report.config['input_len']} tokens in, {report.config['output_len']} out"
    table = Table(title=f"{sizes}; milliseconds, {' / '.join(f'p{p}' for p in PERCENTILES)}")
    for column in ("req/s", "done/s", "tokens/s", *(name.removesuffix("_ms").upper() for name in MEASURES), "failed"):
        table.add_column(column)
    for row in rows_of(report):
        times = [" / ".join(map(_shown, row[name].values())) for name in MEASURES]
        table.add_row(
            f"{row['rate']:g}",
            f"{row['requests_per_second']:g}",
            f"{row['output_tokens_per_second']:g}",
            *times,
            str(row["failed"]),
        )
    console.print(table)


def rows_of(report: Report) -> list[dict[str, Any]]:
    rows: Any = report.numbers["rates"]
    return list(rows)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def draw(report: Report, path: Path) -> None:
    """Percentiles over the rate, beside the JSON file as .png and .svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = rows_of(report)
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, name in zip(panels, ("ttft_ms", "itl_ms"), strict=True):
        for percentile in PERCENTILES:
            values = [row[name][f"p{percentile}"] for row in rows]
            panel.plot([row["rate"] for row in rows], values, marker="o", label=f"p{percentile}")
        panel.set(title=MEASURES[name].capitalize(), xlabel="requests per second offered", ylabel="milliseconds")
        panel.set_yscale("log")
        for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            axis("{x:g}")
        panel.grid(visible=True, which="both", alpha=0.25)
        panel.legend()
    figure.suptitle(
        f"{report.label}: {report.config['input_len']} tokens in, {report.config['output_len']} out, "
        f"on {report.machine['processor']}, {report.machine['cores']} cores"
    )
    save_figure(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
