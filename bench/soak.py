"""Everything at once, for as long as asked, and nothing may change: `python -m bench.soak --help`.

A server of two engines with a tiny float32 model answers clients whose answers are known from a server at rest. Beside
them experts move, clients hang up, hostile bodies arrive (of 16 MiB too), and strangers send garbage to every port that
a process of the world listens on. At the end: did a stream end that should not, did an answer change, did memory,
descriptors or threads of any process grow, is anything left? The exit code is 1 if so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.command import console, keep, parser_for
from bench.footprints import MEASURES, Footprints, Trend, named, thinned
from bench.http_stream import Address
from bench.mixed_load import MixedLoad, known_asks
from bench.report import Report
from bench.soak_picture import draw
from tests.support.letters import write_letters
from tests.support.server import Server, serving
from tests.support.strangers import listening_ports
from tests.support.tiny_model import SIZES, tiny_model

SAMPLE_SECONDS = 1.0
LINE_SECONDS = 30.0
"""Between two lines of progress where there is no terminal."""
WARM_UP_SECONDS = 120.0
WARM_UP_SHARE = 1 / 3
GROWTH = {"uss_mib": 8.0, "rss_mib": 8.0, "descriptors": 3.0, "threads": 0.5}
"""What a process may grow by in the time observed: heaps breathe, connections come and go."""
LOG_BYTES_PER_SECOND = 20_000
GONE_SECONDS = 5.0
SOLVER = "solver"
SHOWN = 5
COUNTS = ("answers", "disconnects", "hostile bodies", "knocks", "rearrangements")
"""Each must be above zero, or the run has not tried what it says."""


@dataclass(frozen=True, slots=True)
class Check:
    """`found` says what was seen, whether it passed or not."""

    name: str
    passed: bool
    found: str


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(Path(folder), "qwen3_moe", seed=5)
        write_letters(Path(folder), SIZES["vocab_size"])
        with serving(folder, *server_options(options)) as server:
            report = asyncio.run(soak(options, server))
    checks: Any = report.numbers["checks"]
    show(checks)
    keep(report, options.out, draw)
    sys.exit(0 if all(check["passed"] for check in checks) else 1)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__, label="dp2", epilog="What follows `--` goes to `moe-serve serve`.")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long; the first third, at most 2, is warm-up")
    parser.add_argument("--dp", type=int, default=2, help="data-parallel ranks")
    parser.add_argument("--redundant", type=int, default=2, help="redundant experts")
    parser.add_argument("--clients", type=int, default=6, help="clients whose answers are compared")
    parser.add_argument("--leavers", type=int, default=2, help="clients that hang up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("server_options", nargs="*", metavar="-- SERVER OPTIONS")
    return parser.parse_args(arguments)


def server_options(options: argparse.Namespace) -> list[str]:
    """Experts move all the time: by the server itself every 200 steps, and by orders."""
    balancing = {
        "policy": "shuffle",
        "window_size": 100,
        "step_interval": 200,
        "num_redundant_experts": options.redundant,
        "min_gain": 0,
    }
    world = ["--dtype", "float32", "-dp", str(options.dp), "-ep", "--kv-cache-memory-bytes", str(16 << 20)]
    return [*world, "--enable-eplb", "--eplb-config", json.dumps(balancing), *options.server_options]


async def soak(options: argparse.Namespace, server: Server) -> Report:
    address = Address.parse(server.base_url)
    known = await known_asks(address, SIZES["vocab_size"], random.Random(options.seed))
    family = server.family()
    prints = Footprints(named(family))
    load = MixedLoad(address, known, listening_ports(family), options.clients, options.leavers)
    started, log_before = time.monotonic(), len(server.log())
    load.start()
    rates = await watch(server, load, prints, 60 * options.minutes, started)
    seconds = time.monotonic() - started
    await load.stop()
    load.counts["knocks"] = sum(load.knocks.values())
    after = set(named(server.family()))
    checks = [*of_answers(load), *of_processes(prints, after, warm_up(seconds)), *of_log(server, log_before, seconds)]
    checks.append(await of_rest(address, known, load))
    checks.append(of_end(server))
    config = {name: getattr(options, name) for name in ("minutes", "dp", "redundant", "clients", "leavers", "seed")}
    numbers = {
        "seconds": round(seconds, 1),
        "warm_up_seconds": round(warm_up(seconds), 1),
        "counts": dict(load.counts),
        "knocks_by_port": [load.knocks[port] for port in load.ports],
        "checks": [asdict(check) for check in checks],
        "wrong": load.wrong,
        "processes": processes_of(prints, warm_up(seconds)),
        "timeline": timeline_of(prints, rates),
    }
    return Report("soak", options.label, config, numbers)


def warm_up(seconds: float) -> float:
    return min(WARM_UP_SECONDS, seconds * WARM_UP_SHARE)


async def watch(
    server: Server, load: MixedLoad, prints: Footprints, seconds: float, started: float
) -> list[tuple[float, float]]:
    """Sample and show until the time is over or the server ends; answers per second at each sample."""
    rates: list[tuple[float, float]] = []
    before, line_at = 0, started + LINE_SECONDS
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while (now := time.monotonic()) < started + seconds and server.process.poll() is None:
            prints.take(round(now - started, 2))
            rates.append((round(now - started, 2), (load.counts["answers"] - before) / SAMPLE_SECONDS))
            before = load.counts["answers"]
            if console.is_terminal:
                live.update(progress(load, prints, seconds), refresh=True)
            elif now > line_at:
                line_at += LINE_SECONDS
                console.print(status(load, prints, seconds), soft_wrap=True)
            await asyncio.sleep(SAMPLE_SECONDS - (time.monotonic() - now) % SAMPLE_SECONDS)
    return rates


def progress(load: MixedLoad, prints: Footprints, seconds: float) -> Group:
    """What is shown while it runs: each process now and at the end of the warm-up, and the last that went wrong."""
    start = warm_up(seconds)
    table = Table(title=status(load, prints, seconds))
    for column in ("process", *(name.replace("_mib", ", MiB") for name in MEASURES)):
        table.add_column(column, justify="left" if column == "process" else "right")
    for name in prints.processes:
        cells = []
        for measure in MEASURES:
            times, values = prints.series(name, measure)
            base = next((value for at, value in zip(times, values, strict=True) if at >= start), None)
            cells.append(
                f"{values[-1]:g}" + ("" if base is None else f" ({values[-1] - base:+.4g})") if values else "-"
            )
        table.add_row(f"{name} GONE" if name in prints.gone else name, *cells)
    return Group(table, Text("\n".join(load.wrong[-SHOWN:]), style="red"))


def status(load: MixedLoad, prints: Footprints, seconds: float) -> str:
    counts = ", ".join(f"{load.counts[name]} {name}" for name in COUNTS if name != "knocks")
    memory = sum(values[-1] for name in prints.processes if (values := prints.series(name, "pss_mib")[1]))
    return f"{prints.times[-1]:.0f} of {seconds:.0f} s: {counts}; {memory:.0f} MiB; {load.counts['wrong']} wrong"


def of_answers(load: MixedLoad) -> list[Check]:
    """Streams, answers and refusals; and that everything was tried."""
    counts = load.counts
    idle = [name for name in COUNTS if not counts[name]]
    return [
        Check(
            "no stream ended that should not, no hostile body was answered otherwise",
            not counts["wrong"],
            f"{counts['wrong']} wrong" + "".join(f"; {what[:300]}" for what in load.wrong[:SHOWN]),
        ),
        Check("no answer changed", not counts["changed"], f"{counts['changed']} of {counts['answers']}"),
        Check(
            "all of it happened",
            not idle,
            ", ".join(f"{counts[name]} {name}" for name in COUNTS) + f"; {len(load.ports)} ports",
        ),
    ]


def of_processes(prints: Footprints, after: Set[str], since: float) -> list[Check]:
    """`after`: names of the processes at the end. A solver may be another: who works on an old question is ended."""
    trends = prints.trends(since)
    gone = {name for name in prints.gone if not name.startswith(SOLVER)} | (prints.processes.keys() - after)
    new = after - prints.processes.keys()
    replaced = ", ".join(f"{name} anew after {at:.0f} s" for name, at in prints.gone.items())
    checks = [
        Check(
            "the processes are those of the beginning",
            not gone and not new,
            f"{len(prints.processes)} processes; gone: {', '.join(gone) or 'none'}; new: {', '.join(new) or 'none'}"
            + (f"; {replaced}" if replaced else ""),
        )
    ]
    for measure, limit in GROWTH.items():
        grown = {name: found[measure] for name, found in trends.items()}
        worst = max(grown, key=lambda name: grown[name].growth, default="")
        checks.append(
            Check(
                f"{measure} is flat",
                bool(grown) and all(each.growth <= limit for each in grown.values()),
                f"most: {worst} {_said(grown[worst])}; allowed {limit:g}" if worst else "no samples after the warm-up",
            )
        )
    return checks


def _said(found: Trend) -> str:
    return f"{found.growth:+.2f} ({found.first:g} -> {found.last:g}, {found.per_hour:+.2f} an hour)"


def of_log(server: Server, before: int, seconds: float) -> list[Check]:
    """No error of the server's own, no secret, and no flood of lines."""
    text = server.log()
    errors = re.findall(r"^.*(?: ERROR | CRITICAL |Traceback).*$", text, re.MULTILINE)
    rate = (len(text) - before) / seconds
    return [
        Check("no error in the log", not errors, f"{len(errors)}" + "".join(f"; {line}" for line in errors[:SHOWN])),
        Check("the log is quiet", rate < LOG_BYTES_PER_SECOND, f"{rate:.0f} bytes a second"),
        Check("the token is not in the log", server.token not in text, f"{len(text)} bytes"),
    ]


async def of_rest(address: Address, known: Sequence[Any], load: MixedLoad) -> Check:
    """When all of it is over every answer is the same once more."""
    try:
        equal = sum([await ask.answer(address) == expected for ask, expected in known])
    except Exception as error:  # noqa: BLE001 (whatever it is: the server does not answer as it did)
        return Check("at rest all answers are the same again", False, f"{type(error).__name__}: {error}")
    return Check("at rest all answers are the same again", equal == len(known), f"{equal} of {len(known)}")


def of_end(server: Server) -> Check:
    """SIGTERM: exit code 0, and no process is left."""
    name = "it ends by SIGTERM with code 0 and leaves nothing"
    if server.process.poll() is not None:
        return Check(name, False, f"it had ended before with code {server.process.returncode}: {server.log()[-1000:]}")
    started = time.monotonic()
    code, left = server.terminate(), server.wait_gone(GONE_SECONDS)
    return Check(
        name, code == 0 and not left, f"code {code} after {time.monotonic() - started:.1f} s, {len(left)} left"
    )


def processes_of(prints: Footprints, since: float) -> Mapping[str, object]:
    return {
        name: {measure: asdict(found) for measure, found in measures.items()}
        for name, measures in prints.trends(since).items()
    }


def timeline_of(prints: Footprints, rates: Sequence[tuple[float, float]]) -> Mapping[str, object]:
    """At most 240 points of each series."""
    return {
        "seconds": thinned(prints.times),
        "answers_per_second": [[at, rate] for at, rate in _averaged(rates)],
        "processes": {
            name: {measure: thinned(prints.series(name, measure)[1]) for measure in MEASURES}
            for name in prints.processes
        },
    }


def _averaged(rates: Sequence[tuple[float, float]], into: int = 120) -> list[tuple[float, float]]:
    step = max(1, len(rates) // into)
    parts = [rates[start : start + step] for start in range(0, len(rates), step)]
    return [(part[-1][0], round(sum(rate for _, rate in part) / len(part), 2)) for part in parts]


def show(checks: Sequence[Mapping[str, object]]) -> None:
    table = Table("", "check", "found")
    for check in checks:
        table.add_row("ok" if check["passed"] else "FAILED", str(check["name"]), Text(str(check["found"])))
    console.print(table)


if __name__ == "__main__":
    main()
