"""What load balancing gains in tokens per second where ranks have a core each: `python -m bench.eplb_gain --help`.

The experts of the first half are hot, so a linear placement puts them together on rank 0 of two. Three servers stay
loaded and take the same prompts by turns: one that never moves an expert, one that balances, and one that begins with
a balanced placement from a file. Every engine has all its threads on a core of its own, and one thread to compute with.
Beside what was measured stand two models: only the slowest rank's rows count, and the one that decides in the server.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from bench.command import keep, parser_for
from bench.http_stream import get_json, post_json
from bench.pairs import compare_one
from bench.report import Report, spread
from bench.started_server import Started, started
from moe_serve.base.weight_files import SINGLE
from moe_serve.cli.random_model import PRESETS, Preset, make_model

RANKS = 2
WIDE = Preset(hidden=512, layers=4, heads=8, kv_heads=2, experts=16, top_k=4, width=1024)
"""Experts take most of a step, as in a large model."""
WITHOUT, BALANCING, FROM_START = "without", "balancing", "balanced from the start"
console = Console(stderr=True)


@dataclass(slots=True)
class Turns:
    """Tokens per second of one server, prompts and answers together; `epochs` what the balancing one served then."""

    speeds: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)
    """Of rounds that do not count."""
    epochs: list[int] = field(default_factory=list)


def main() -> None:
    options = parse()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < RANKS:
        raise SystemExit(f"{RANKS} ranks need a core each, and this process may use {len(cores)}")
    os.sched_setaffinity(0, cores[:RANKS])  # what is started reckons its threads by it
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(measure(options, Path(folder), cores[:RANKS]))
    show(report)
    keep(report, options.out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__, label="many-rows")
    parser.add_argument("--requests", type=int, default=12, help="at a time, in each turn")
    parser.add_argument("--input-len", type=int, default=192, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=4, help="tokens of each answer")
    parser.add_argument("--turns", type=int, default=9, help="of each server, undisturbed and after the warm-up")
    parser.add_argument("--most-seconds", type=float, default=100.0, help="for all turns")
    parser.add_argument("--warm-up", type=int, default=4, help="turns that do not count")
    parser.add_argument(
        "--foreign-cores",
        type=float,
        default=0.25,
        help="a round in which others used more of the cores does not count",
    )
    parser.add_argument("--batched-tokens", type=int, default=512, help="most in one step of an engine")
    parser.add_argument("--heat", type=float, default=8.0, help="of the hot experts' router rows, the others being 1")
    parser.add_argument("--window", type=int, default=20, help="steps in the window")
    parser.add_argument("--interval", type=int, default=60, help="steps between two rearrangements")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


async def measure(options: argparse.Namespace, folder: Path, cores: Sequence[int]) -> Report:
    model = hot_model(folder / "model", options)
    file = folder / "balanced.json"
    with started(str(model), server_options(options, policy="static")) as scout:
        await turn(scout, options, prompts(options, -1))
        await asyncio.sleep(1.0)  # for the last bucket of load
        before = await get_json(scout.address, "/eplb")
        plan = await post_json(scout.address, "/eplb/plan", {"policy": "sticky"})
    file.write_text(json.dumps(plan["placement"]))
    ways = {
        WITHOUT: server_options(options),
        BALANCING: server_options(options, policy="sticky"),
        FROM_START: [*server_options(options), "--expert-placement-file", str(file)],
    }
    with ExitStack() as stack:
        servers = {name: stack.enter_context(started(str(model), way)) for name, way in ways.items()}
        for server in servers.values():
            pin(server, cores)
        turns = await alternate(servers, options)
        state = await get_json(servers[BALANCING].address, "/eplb")
    config = {name: value for name, value in vars(options).items() if name not in ("out", "label")}
    return Report("eplb_gain", options.label, config | {"ranks": RANKS}, numbers_of(turns, plan, before, state))


def hot_model(folder: Path, options: argparse.Namespace) -> Path:
    """A random checkpoint whose first half of experts is chosen more often in all layers."""
    PRESETS["wide"] = WIDE
    make_model(folder, "wide", seed=options.seed, dtype=options.dtype)  # type: ignore[arg-type]
    tensors = load_file(folder / SINGLE)
    for name, weight in tensors.items():
        if name.endswith("mlp.gate.weight"):
            weight[: WIDE.experts // 2] *= options.heat
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def server_options(options: argparse.Namespace, *, policy: str = "") -> list[str]:
    """Of a server that balances by `policy`, or of one that does not watch the load at all."""
    world = ["-dp", str(RANKS), "-ep", "--dtype", options.dtype, "--no-enable-prefix-caching"]
    world += ["--max-num-batched-tokens", str(options.batched_tokens), "--kv-cache-memory-bytes", str(1 << 27)]
    if policy:
        eplb = {"policy": policy, "window_size": options.window, "step_interval": options.interval}
        world += ["--enable-eplb", "--eplb-config", json.dumps(eplb)]
    return world


def pin(server: Started, cores: Sequence[int]) -> None:
    """Each engine on its core, with all the threads that it has."""
    engines = [child for child in family_of(server) if "moe_serve.engine.process" in child.cmdline()]
    if len(engines) != len(cores):
        raise SystemExit(f"{len(engines)} engines for {len(cores)} cores")
    for engine in engines:
        rank = json.loads(engine.environ()["MOE_SERVE_MEMBER"])["dp"]
        for thread in engine.threads():
            os.sched_setaffinity(thread.id, {cores[rank]})


async def alternate(servers: dict[str, Started], options: argparse.Namespace) -> dict[str, Turns]:
    """By turns on the same prompts, until enough rounds were undisturbed or the time is over."""
    found = {name: Turns() for name in servers}
    names, orders = list(servers), random.Random(options.seed)
    own = [psutil.Process(), *(each for server in servers.values() for each in family_of(server))]
    deadline = time.monotonic() + options.most_seconds
    for number in itertools.count():
        batch, foreign, round_ = prompts(options, number), foreign_seconds(own), dict[str, float]()
        begun = time.monotonic()
        for name in orders.sample(names, len(names)):  # in any order: nobody always comes behind the same one
            round_[name] = await turn(servers[name], options, batch)
        cores = (foreign_seconds(own) - foreign) / (time.monotonic() - begun)
        if number < options.warm_up:
            continue
        epoch = (await get_json(servers[BALANCING].address, "/eplb"))["epoch"]
        for name, each in found.items():
            (each.disturbed if cores > options.foreign_cores else each.speeds).append(round_[name])
            each.epochs.append(epoch)
        counted = len(found[WITHOUT].speeds)
        console.print(f"round {number}: others used {cores:.2f} cores; {counted} of {options.turns} rounds count")
        if counted == options.turns or time.monotonic() > deadline:
            break
    if not found[WITHOUT].speeds:
        raise SystemExit("all rounds were disturbed by others; try again when the machine is quiet")
    return found


def family_of(server: Started) -> list[psutil.Process]:
    launcher = psutil.Process(server.pid)
    return [launcher, *launcher.children(recursive=True)]


def foreign_seconds(own: Sequence[psutil.Process]) -> float:
    """Processor time of all processes but these, since the machine was started."""
    times = psutil.cpu_times()
    busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
    return float(busy) - sum(each.cpu_times().user + each.cpu_times().system for each in own if each.is_running())


def prompts(options: argparse.Namespace, number: int) -> list[list[int]]:
    """New ones for every turn."""
    numbers = random.Random(options.seed * 10_000 + number)
    return [[numbers.randrange(3, WIDE.vocab) for _ in range(options.input_len)] for _ in range(options.requests)]


async def turn(server: Started, options: argparse.Namespace, batch: list[list[int]]) -> float:
    """All prompts at once to the end of their answers; tokens per second."""
    sampling = {"max_tokens": options.output_len, "temperature": 0, "ignore_eos": True}
    begun = time.perf_counter()
    asked = [post_json(server.address, "/v1/completions", {"prompt": prompt, **sampling}) for prompt in batch]
    answers = await asyncio.gather(*asked)
    seconds = time.perf_counter() - begun
    return float(sum(answer["usage"]["total_tokens"] for answer in answers) / seconds)


def numbers_of(
    turns: dict[str, Turns], plan: dict[str, Any], before: dict[str, Any], state: dict[str, Any]
) -> dict[str, Any]:
    """`plan` from the linear placement's load; a speed-up of 1 is none, and `reached` the part of a modelled one."""
    ratios = {name: compare_one(turns[WITHOUT].speeds, turns[name].speeds)["ratio"] for name in (BALANCING, FROM_START)}
    moved = [entry for entry in state["history"] if "epoch" in entry and not entry["failure"]]
    judgement = moved[0]["judgement"] if moved else state["judgement"]
    models = {"rows_alone": 1 / (1 - plan["gain"]), "gate": 1 / (1 - judgement["gain"]) if judgement else 1.0}
    speed_ups = {name: float(str(ratio)) for name, ratio in ratios.items()}
    return {
        "balancedness_linear": round(before["balancedness"], 4),
        "balancedness_planned": round(plan["balancedness_after"], 4),
        "tokens_per_second": {name: spread(each.speeds) for name, each in turns.items()},
        "disturbed_rounds": len(turns[WITHOUT].disturbed),
        "speed_up": speed_ups,
        "modelled_speed_up": {name: round(value, 4) for name, value in models.items()},
        "reached": {
            name: round((speed_ups[BALANCING] - 1) / (value - 1), 3) for name, value in models.items() if value > 1
        },
        "judgement": judgement,
        "rearrangements": len(moved),
        "moved_experts": sum(entry["moved_experts"] for entry in moved),
        "in_counted_turns": max(turns[BALANCING].epochs) - min(turns[BALANCING].epochs),
        "balancedness_at_the_end": round(state["balancedness"], 4),
        "refused": [
            entry["text"] for entry in state["history"] if entry.get("skipped") in ("small_gain", "within_noise")
        ],
    }


def show(report: Report) -> None:
    numbers: dict[str, Any] = dict(report.numbers)
    table = Table(
        "", "tokens/s (median)", "all turns", title=f"balancedness {numbers['balancedness_linear']} if linear"
    )
    for name, speeds in numbers["tokens_per_second"].items():
        table.add_row(name, str(speeds["median"]), str(speeds["all"]))
    console.print(table)
    console.print({key: value for key, value in numbers.items() if key != "tokens_per_second"})


if __name__ == "__main__":
    main()
