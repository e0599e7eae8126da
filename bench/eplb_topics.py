"""What load balancing gains when the traffic's topic changes: `python -m bench.eplb_topics --help`.

The same traffic runs against two servers, one after the other: one that watches the load and moves nothing, one that
balances. Every stretch of time the prompts come from another domain. Balancedness is that of the server's own window;
the modelled gain is what the experts would save if only the slowest rank's rows counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.command import keep, parser_for, save_figure
from bench.domains import domains, prompts_of
from bench.http_stream import Address, get_json
from bench.report import Report, percentiles
from bench.started_server import started
from bench.steady_load import SteadyLoad

SAMPLE_SECONDS = 0.5
console = Console(stderr=True)


@dataclass(slots=True)
class Run:
    """One server under the traffic. Times are seconds from its beginning."""

    balancedness: list[tuple[float, float]] = field(default_factory=list)
    topics: list[tuple[float, str]] = field(default_factory=list)
    rearrangements: list[tuple[float, int]] = field(default_factory=list)
    tokens_per_second: float = 0.0
    gaps: list[float] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Rearrangements that were not made: the reason in one word and in a sentence."""


def main() -> None:
    options = parse()
    runs = {}
    for policy in ("static", options.policy):
        with started(options.model, server_options(options, policy)) as server:
            runs[policy] = asyncio.run(drive(options, server.address))
        console.print(f"{policy}: {runs[policy].tokens_per_second:.0f} tokens/s")
    report = report_of(options, runs)
    show(report)
    keep(report, options.out, draw)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__, label="default-model")
    parser.add_argument("--model", help="checkpoint folder; a random tiny one if not given")
    parser.add_argument("--dp", type=int, default=4, help="data-parallel ranks")
    parser.add_argument("--redundant", type=int, default=4, help="redundant experts")
    parser.add_argument("--policy", default="sticky", help="of the server that balances")
    parser.add_argument("--window", type=int, default=100, help="steps in the window")
    parser.add_argument("--interval", type=int, default=200, help="steps between two rearrangements")
    parser.add_argument("--min-gain", type=float, help="as in --eplb-config; the server's default if not given")
    parser.add_argument("--clients", type=int, default=16, help="streams at a time")
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--stretch", type=float, default=20.0, help="seconds of one topic")
    parser.add_argument("--rounds", type=int, default=2, help="times through all topics")
    return parser.parse_args(arguments)


def server_options(options: argparse.Namespace, policy: str) -> list[str]:
    eplb = {
        "policy": policy,
        "num_redundant_experts": options.redundant,
        "window_size": options.window,
        "step_interval": options.interval,
    }
    if options.min_gain is not None:
        eplb["min_gain"] = options.min_gain
    return ["-dp", str(options.dp), "-ep", "--enable-eplb", "--eplb-config", json.dumps(eplb)]


async def drive(options: argparse.Namespace, address: Address) -> Run:
    """All topics in turn; the balancedness is asked for while streams run."""
    run, now = Run(), prompts_of(domains()[0], 300)
    load = SteadyLoad(address, options.clients, options.output_len, lambda numbers: now(numbers))
    load.start()
    zero = time.monotonic()
    for name in domains() * options.rounds:
        now = prompts_of(name, 300)
        begun = time.monotonic()
        run.topics.append((round(begun - zero, 2), name))
        while time.monotonic() < begun + options.stretch:
            await asyncio.sleep(SAMPLE_SECONDS)
            load.check()
            await sample(run, address, time.monotonic() - zero)
    seconds = time.monotonic() - zero
    run.tokens_per_second = len(load.token_times) / seconds
    run.gaps = [gap.seconds for gap in load.gaps]
    history = (await get_json(address, "/eplb"))["history"]
    run.refused = [(entry["skipped"], entry["text"]) for entry in history if "skipped" in entry]
    await load.stop()
    return run


async def sample(run: Run, address: Address, at: float) -> None:
    state = await get_json(address, "/eplb")
    if any(any(layer) for layer in state["window_load"]):
        run.balancedness.append((round(at, 2), round(state["balancedness"], 4)))
    done = [entry for entry in state["history"] if "epoch" in entry and not entry["failure"]]
    for entry in done[len(run.rearrangements) :]:
        run.rearrangements.append((round(at, 2), entry["moved_experts"]))


def report_of(options: argparse.Namespace, runs: dict[str, Run]) -> Report:
    config = {
        name: getattr(options, name)
        for name in ("dp", "redundant", "policy", "window", "interval", "clients", "output_len", "stretch", "rounds")
    }
    if options.min_gain is not None:
        config["min_gain"] = options.min_gain
    numbers: dict[str, Any] = {policy: _numbers(run) for policy, run in runs.items()}
    before, after = (numbers[policy] for policy in ("static", options.policy))
    numbers["ratio"] = {
        "tokens_per_second": round(after["tokens_per_second"] / before["tokens_per_second"], 3),
        "balancedness": round(after["mean_balancedness"] / before["mean_balancedness"], 3),
    }
    numbers["modelled_expert_speedup"] = numbers["ratio"]["balancedness"]
    return Report("eplb_topics", options.label, config, numbers)


def _numbers(run: Run) -> dict[str, Any]:
    values = [value for _, value in run.balancedness]
    return {
        "tokens_per_second": round(run.tokens_per_second, 1),
        "mean_balancedness": round(sum(values) / len(values), 4),
        "gaps_ms": percentiles(run.gaps, 1000),
        "rearrangements": len(run.rearrangements),
        "moved_experts": sum(moved for _, moved in run.rearrangements),
        "refused": dict(Counter(reason for reason, _ in run.refused)),
        "refused_last": run.refused[-1][1] if run.refused else "",
        "timeline": {
            "balancedness": run.balancedness,
            "topics": run.topics,
            "rearrangements": run.rearrangements,
        },
    }


def _sides(report: Report) -> list[tuple[str, dict[str, Any]]]:
    """(policy, its numbers), the resting server first."""
    found = [(name, report.numbers[name]) for name in ("static", str(report.config["policy"]))]
    return [(name, numbers) for name, numbers in found if isinstance(numbers, dict)]


def show(report: Report) -> None:
    table = Table(title=f"topics in turn, dp={report.config['dp']}, {report.config['redundant']} redundant experts")
    for name in ("", "tokens/s", "mean balancedness", "p50 gap ms", "p99 gap ms", "rearrangements", "experts moved"):
        table.add_column(name, justify="left" if not name else "right")
    for policy, side in _sides(report):
        table.add_row(
            policy,
            f"{side['tokens_per_second']:.1f}",
            f"{side['mean_balancedness']:.3f}",
            f"{side['gaps_ms']['p50']:.1f}",
            f"{side['gaps_ms']['p99']:.1f}",
            str(side["rearrangements"]),
            str(side["moved_experts"]),
        )
    Console().print(table)
    Console().print(f"ratio {report.numbers['ratio']}")


def draw(report: Report, path: Path) -> None:
    """Balancedness over time with and without, rearrangements marked, topics named."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(11, 4.5), layout="constrained")
    for (policy, side), colour in zip(_sides(report), ("tab:gray", "tab:blue"), strict=True):
        times, values = zip(*side["timeline"]["balancedness"], strict=True)
        title = "nothing moves" if policy == "static" else policy
        panel.plot(times, values, color=colour, label=f"{title}: {side['tokens_per_second']:.0f} tokens/s")
        for at, _ in side["timeline"]["rearrangements"]:
            panel.axvline(at, color=colour, alpha=0.3, linewidth=1)
    topics = _sides(report)[0][1]["timeline"]["topics"]
    for number, (at, name) in enumerate(topics):
        panel.axvspan(
            at, at + float(str(report.config["stretch"])), color="black", alpha=0.05 * (number % 2), linewidth=0
        )
        panel.text(at, 1.0, f" {name}", va="bottom", fontsize=8)
    panel.set(xlabel="seconds (vertical lines: a rearrangement)", ylabel="balancedness of the window", ylim=(None, 1.0))
    panel.grid(visible=True, alpha=0.25)
    panel.legend(loc="lower right")
    save_figure(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
