"""Balance, moves and solve time of all load-balancing policies, without a model: `python -m bench.eplb_balancedness`.

Made-up loads (bench/traces.py) and recorded ones (`--traces FILE ...`): each policy plans on one window and is scored
on the steps of the next, with an even split over copies and with shares refreshed from the first steps of that window.
Solve times are the least of several, for worlds of several sizes, on one thread. Writes JSON and pictures.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from rich.console import Console

from bench.command import keep, parser_for
from bench.report import RESULTS, Report, markdown_table
from bench.traces import GENERATORS, lognormal, sample, trace, zipf
from moe_serve.base.tables import EPLB_POLICIES
from moe_serve.eplb.desk.loads import Trace, read_trace
from moe_serve.eplb.desk.pictures import draw_heat, draw_replay, save
from moe_serve.eplb.desk.plan import make_plan
from moe_serve.eplb.desk.replay import Outcome, ReplayWorld, replay
from moe_serve.eplb.policies.base import Policy, Problem, problem_of
from moe_serve.eplb.policies.deepseek import deepseek, deepseek_global
from moe_serve.eplb.policies.sticky import sticky
from moe_serve.eplb.search.scores import mean_of_ratios, rank_loads

console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Size:
    """A world to solve for, in `layers` layers."""

    experts: int
    redundant: int
    ranks: int
    nodes: int = 1
    groups: int = 1
    layers: int = 58

    def label(self) -> str:
        world = f"{self.ranks} ranks" + (f" on {self.nodes} nodes, {self.groups} groups" if self.nodes > 1 else "")
        return f"{self.layers} x {self.experts} -> {self.experts + self.redundant} on {world}"


SIZES = (
    Size(256, 32, 32),
    Size(256, 32, 32, nodes=4, groups=8),
    Size(256, 32, 288),
    Size(2048, 0, 2048),
    Size(2048, 2048, 2048),
)


def main() -> None:
    options = parse()
    world = ReplayWorld(options.ranks, options.nodes)
    traces = {name: made_up(name, options) for name in options.kinds} | {
        path.stem: read_trace(path) for path in options.traces
    }
    folder = options.out or RESULTS / str(Report("", "", {}, {}).machine["name"])
    replays = {}
    for name, of_trace in traces.items():
        console.print(f"replaying {name}")
        outcomes = replay(
            of_trace,
            world,
            policies=list(EPLB_POLICIES),
            redundancies=options.redundant,
            window_steps=options.steps,
        )
        save(draw_replay(outcomes, f"{name}: plan on one window, score on the next"), folder, f"eplb-{name}")
        replays[name] = outcomes
    console.print("from nothing")
    fresh = from_nothing(options)
    console.print("solve times")
    numbers = {
        "replays": {name: [outcome.summary() for outcome in outcomes] for name, outcomes in replays.items()},
        "from_nothing": fresh,
        "solve_ms": {size.label(): solve_times(size, options.repetitions) for size in SIZES},
    }
    draw_before_and_after(options, folder)
    names = ("ranks", "nodes", "experts", "layers", "windows", "steps", "tokens", "redundant", "seed")
    report = Report("eplb_balancedness", options.label, {name: getattr(options, name) for name in names}, numbers)
    print(tables(replays, fresh, cast(dict[str, dict[str, float]], numbers["solve_ms"])))
    keep(report, folder)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__, label="made-up")
    parser.add_argument("--kinds", nargs="*", default=list(GENERATORS), choices=list(GENERATORS))
    parser.add_argument("--traces", nargs="*", type=Path, default=[], help="recorded loads to replay as well")
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--redundant", type=int, nargs="+", default=[0, 32, 64])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--windows", type=int, default=13)
    parser.add_argument("--steps", type=int, default=40, help="of each window")
    parser.add_argument("--tokens", type=int, default=16384, help="of each step, with 8 experts each")
    parser.add_argument("--repetitions", type=int, default=15, help="of each solve; the least time counts")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def made_up(kind: str, options: argparse.Namespace) -> Trace:
    generator = np.random.default_rng(options.seed)
    popularity = GENERATORS[kind](generator, options.windows, options.layers, options.experts)
    return Trace(trace(generator, popularity, steps=options.steps, tokens=options.tokens))


def from_nothing(options: argparse.Namespace) -> list[dict[str, object]]:
    """Balancedness on the load planned on, without a present placement; and copies that share a rank."""
    rows: list[dict[str, object]] = []
    for kind in options.kinds:
        for alpha in (0.5, 1.0, 1.5) if kind == "zipf" else (None,):
            generator = np.random.default_rng(options.seed)
            extra = {} if alpha is None else {"alpha": alpha}
            popularity = GENERATORS[kind](generator, 1, options.layers, options.experts, **extra)[0]
            load_LE = sample(generator, popularity, tokens=options.tokens * 50)
            for num_redundant in options.redundant:
                plain = problem_of(load_LE, num_ranks=options.ranks, num_redundant=num_redundant)
                grouped = problem_of(
                    load_LE,
                    num_ranks=options.ranks,
                    num_redundant=num_redundant,
                    num_nodes=options.nodes,
                    num_groups=2 * options.nodes,
                )
                placements = {
                    "deepseek_global": deepseek_global(plain),
                    "deepseek_hierarchical": deepseek(grouped),
                    "sticky": sticky(plain),
                    "sticky_groups": sticky(grouped),
                }
                row: dict[str, object] = {
                    "load": kind if alpha is None else f"zipf {alpha}",
                    "redundant": num_redundant,
                }
                for name, placement in placements.items():
                    row[name] = round(mean_of_ratios(rank_loads(plain.load_LE, placement)), 4)
                    row[f"{name}_duplicates"] = placement.num_duplicates()
                rows.append(row)
    return rows


def solve_times(size: Size, repetitions: int) -> dict[str, float]:
    """Milliseconds: each policy from nothing, and sticky from its own placement after one window of drift."""
    generator = np.random.default_rng(0)
    windows = lognormal(generator, 2, size.layers, size.experts)
    loads = [sample(generator, window, tokens=16384 * 50) for window in windows]

    def problem(load_LE: np.ndarray, current: object = None) -> Problem:
        return problem_of(
            load_LE,
            num_ranks=size.ranks,
            num_redundant=size.redundant,
            num_nodes=size.nodes,
            num_groups=size.groups,
            current=current,  # type: ignore[arg-type]
        )

    first = problem(loads[0])
    times = {
        "sticky": least_ms(sticky, first, repetitions),
        "sticky, after drift": least_ms(sticky, problem(loads[1], sticky(first)), repetitions),
        "deepseek": least_ms(deepseek, first, repetitions),
    }
    console.print(f"{size.label()}: {times}")
    return times


def least_ms(policy: Policy, problem: Problem, repetitions: int) -> float:
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        policy(problem)
        times.append(time.perf_counter() - started)
    return round(min(times) * 1e3, 2)


def draw_before_and_after(options: argparse.Namespace, folder: Path) -> None:
    generator = np.random.default_rng(options.seed)
    popularity = zipf(generator, 1, 1, options.experts, alpha=0.8)[0]
    load_LE = sample(generator, popularity, tokens=options.tokens * 50)
    plan = make_plan(problem_of(load_LE, num_ranks=options.ranks, num_redundant=options.ranks), "sticky")
    save(draw_heat(plan.load_LE, plan.before, plan.after, 0), folder, "eplb-heat")


def tables(
    replays: dict[str, list[Outcome]], fresh: Sequence[dict[str, object]], solve_ms: dict[str, dict[str, float]]
) -> str:
    """Everything as Markdown."""
    header = ("load", "redundant", "policy", "balanced", "uneven shares", "moved %", "cross-node moves")
    rows = []
    for name, outcomes in replays.items():
        for outcome in outcomes:
            means = cast(dict[str, float], outcome.summary())
            rows.append(
                (
                    name,
                    outcome.num_redundant,
                    outcome.policy,
                    f"{means['balancedness']:.4f}",
                    f"{means['balancedness_uneven']:.4f}",
                    f"{means['moved_share'] * 100:.1f}",
                    f"{means['cross_node_moves']:.0f}",
                )
            )
    parts = [markdown_table(header, rows)]
    parts.append(markdown_table(list(fresh[0]), [list(row.values()) for row in fresh]) if fresh else "")
    columns = list(next(iter(solve_ms.values())))
    parts.append(markdown_table(["ms", *columns], [[size, *times.values()] for size, times in solve_ms.items()]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
