"""`moe-serve plan`: what `moe-serve serve` with the same options would start, where, and whether it fits."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from moe_serve.base.config import SECTIONS, Config
from moe_serve.base.errors import ConfigError
from moe_serve.cli.eplb import Parser
from moe_serve.cli.flags import help_text, wants_help
from moe_serve.cli.serve import parse_serve, serve_options
from moe_serve.launch.plan import NodePlan, RankPlan, WorldPlan, plan_world
from moe_serve.launch.resolve import resolve

ABOUT_PLAN = (
    "Print the world that `moe-serve serve` with the same options would start, without starting anything: ranks, "
    "experts, bytes, processes and ports. Only the model's config.json is read. Exit code 2 and one sentence if it "
    "cannot be."
)
OWN_OPTIONS = """plan:

  --memory-bytes N
        Memory of each rank's device: how many KV blocks the weights leave room for, or that they do not fit.

  --json
        One JSON object on standard output instead of tables."""
NODE_FLAGS = {"-r", "--node-rank"}
SERVER_FLAGS = {"-asc", "--api-server-count", "--host", "--port", "--api-key", "--admin-api-key"}
"""Of the node that has the server."""
MOST_ROWS = 64
MIB = 2**20


def run_plan(arguments: Sequence[str]) -> int:
    """The `plan` command: its exit code. ConfigError for what cannot be."""
    if wants_help(arguments):
        groups = {title: section.model_fields for title, section in SECTIONS.items()}
        print(f"{help_text(serve_options(), 'plan', ABOUT_PLAN, groups)}\n\n{OWN_OPTIONS}")
        return 0
    own, rest = split_arguments(arguments)
    config = parse_serve(rest)
    resolved, model = resolve(config, weights=False)
    plan = plan_world(resolved, model, memory_bytes=own.memory_bytes)
    lines = [node_line(rest, node) for node in range(config.parallel.nnodes)] if config.parallel.is_spread else []
    if own.json:
        print(json.dumps(asdict(plan) | {"lines": lines}))
    else:
        _show(plan)
        for node, line in enumerate(lines):
            print(f"on node {node}: {line}")
    return 0


def parse_plan(arguments: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Its own options, `memory_bytes` and `json`, and those of `serve`. Raises ConfigError."""
    own, rest = split_arguments(arguments)
    return own, parse_serve(rest)


def node_line(arguments: Sequence[str], node: int) -> str:
    """What to type on one of the nodes of an engine, from what was given here for one of them."""
    others = NODE_FLAGS if node == 0 else NODE_FLAGS | SERVER_FLAGS
    kept: list[str] = []
    values = iter(arguments)
    for argument in values:
        flag, has_value, _ = argument.replace("_", "-").partition("=")
        if flag not in others:
            kept.append(argument)
        elif not has_value:
            next(values, None)
    return shlex.join(["moe-serve", "serve", *kept, "--node-rank", str(node)])


def split_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Its own options, and all others. Raises ConfigError."""
    parser = Parser(prog="moe-serve plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--memory-bytes", "--memory_bytes", type=int)
    parser.add_argument("--json", action="store_true")
    own, rest = parser.parse_known_args(arguments)
    if own.memory_bytes is not None and own.memory_bytes < 1:
        raise ConfigError(f"--memory-bytes must be at least 1, not {own.memory_bytes}")
    return own, rest


def _show(plan: WorldPlan) -> None:
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
    console.print(plan.summary, soft_wrap=True, highlight=False)
    console.print(_ranks_table(plan))
    if len(plan.ranks) > MOST_ROWS:
        console.print(f"and {len(plan.ranks) - MOST_ROWS} more ranks; --json has them all")
    console.print(_nodes_table(plan.nodes))
    for line in _totals(plan):
        console.print(line, soft_wrap=True, highlight=False)


def _ranks_table(plan: WorldPlan) -> Table:
    table = Table(title="Ranks")
    headings = ("rank", "dp", "pp", "tp", "ep", "node", "device", "layers", "experts", "weights MiB", "KV blocks")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("device", "experts") else "right")
    for each in plan.ranks[:MOST_ROWS]:
        table.add_row(
            *map(str, (each.rank, each.dp, each.pp, each.tp, each.ep, each.node, each.device)),
            spans(range(*each.layers)),
            _experts(each),
            f"{each.weight_bytes / MIB:,.1f}",
            "?" if each.kv_blocks is None else f"{each.kv_blocks:,}",
        )
    return table


def _experts(rank: RankPlan) -> str:
    """Of the first layer, and whether others have other ones."""
    first, width = rank.experts[0], range(*rank.expert_width)
    text = f"{len(first)}: {spans(first)}"
    if any(layer != first for layer in rank.experts):
        text += ", others in other layers"
    return text if rank.whole_experts else f"{text}, each cut to columns {spans(width)}"


def spans(numbers: Iterable[int]) -> str:
    """`0-3, 8, 12-13`: runs of neighbours, in the order given."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"


def _nodes_table(nodes: Sequence[NodePlan]) -> Table:
    table = Table(title="Nodes")
    for heading in ("node", "dp ranks", "processes", "listens"):
        table.add_column(heading, justify="right" if heading == "node" else "left")
    for each in nodes[:MOST_ROWS]:
        ports = [f"{port.what}: {port.host}:{port.port or 'any free'} ({port.option})" for port in each.ports]
        names = [process.name for process in each.processes]
        name = f"{each.node} (here)" if each.here and len(nodes) > 1 else str(each.node)
        table.add_row(name, spans(each.dp_ranks), "\n".join(names), "\n".join(ports))
    return table


def _totals(plan: WorldPlan) -> list[str]:
    weights = [each.weight_bytes for each in plan.ranks]
    lines = [
        f"weights: {sum(weights) / MIB:,.1f} MiB on all ranks, {min(weights) / MIB:,.1f} to {max(weights) / MIB:,.1f} "
        f"on each ({plan.dtype})"
    ]
    if plan.kv_tokens is None:
        lines.append("KV cache: not known; give --kv-cache-memory-bytes, or --memory-bytes of each rank's device")
    else:
        lines.append(
            f"KV cache: {plan.kv_tokens:,} tokens in each engine, sequences of at most {plan.max_model_len:,}; "
            "activations of a step not counted"
        )
    return lines
