"""`moe-serve eplb plan|replay|redundancy`: load balancing at a desk, from recorded loads, without a server or torch.

`record` makes such a recording with an engine in this process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from moe_serve.base.errors import ConfigError
from moe_serve.base.registry import import_target
from moe_serve.base.tables import EPLB_POLICIES
from moe_serve.cli.eplb_output import (
    console,
    print_facts,
    redundancy_table,
    replay_table,
    report_pictures,
    write_or_print,
)
from moe_serve.eplb.desk.loads import Trace, read_trace, write_trace
from moe_serve.eplb.desk.pictures import draw_heat, draw_redundancy, draw_replay, new_figure, save
from moe_serve.eplb.desk.plan import make_plan
from moe_serve.eplb.desk.replay import (
    ReplayWorld,
    balancedness_of_start,
    cut,
    redundancy_curve,
    replay,
    worthwhile,
)
from moe_serve.eplb.placement import Placement
from moe_serve.eplb.placement_file import read_placement, write_placement
from moe_serve.eplb.policies.base import check_load, problem_of

ENGINE_OPTIONS: dict[str, tuple[type, str]] = {
    "dtype": (str, "auto, float32, bfloat16 or float16"),
    "device": (str, "auto, cpu or cuda"),
    "max_num_seqs": (int, "most requests in one step"),
    "max_num_batched_tokens": (int, "most tokens in one step"),
    "max_model_len": (int, "longest prompt plus answer in tokens"),
}
"""Options of the engine that a recording may set; they mean what they mean to `moe-serve serve`."""


WORDS = {"model", "architecture", "made_by"}
"""Metadata of a recording that are no numbers."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog.removeprefix('moe-serve ')}: {message} (--help lists the options)")


def run_eplb(arguments: Sequence[str]) -> int:
    """The `eplb` command: its exit code. Raises ConfigError for the user's mistakes."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def run_plan(options: argparse.Namespace) -> int:
    """Plan a placement on a recorded load and write it."""
    EPLB_POLICIES.check(options.policy)
    _check_folder(options.out)
    console.print(f"reading {options.load}", soft_wrap=True)
    load_LE = read_trace(options.load).load()
    current = _read_current(options, load_LE.shape)
    problem = problem_of(
        load_LE,
        num_ranks=options.ranks,
        num_redundant=options.redundant,
        num_nodes=options.nodes,
        num_groups=options.groups,
        current=current,
    )
    layers, experts = load_LE.shape
    console.print(
        f"planning {layers} layers of {experts} experts on {problem.num_physical} slots of {options.ranks} ranks"
    )
    plan = make_plan(problem, options.policy)
    if options.out is not None:
        write_placement(options.out, plan.after, options.nodes)
        console.print(f"wrote {options.out}", soft_wrap=True)
    if options.pictures is not None:
        heaviest = int(load_LE.max(axis=1).argmax())
        report_pictures(save(draw_heat(load_LE, plan.before, plan.after, heaviest), options.pictures, "heat"))
    print_facts(plan.report(), as_json=options.json)
    return 0


def _read_current(options: argparse.Namespace, shape: tuple[int, ...]) -> Placement | None:
    if options.current is None:
        return None
    return read_placement(
        options.current,
        num_layers=shape[0],
        num_experts=shape[1],
        num_ranks=options.ranks,
        num_redundant=options.redundant,
    )


def run_replay(options: argparse.Namespace) -> int:
    """Replay a trace under several policies and redundancies."""
    policies, redundancies = _names(options.policies), _counts(options.redundant, "--redundant")
    trace, world = _start(options)
    windows = cut(trace, options.window_steps)
    outcomes = replay(
        trace,
        world,
        policies=policies,
        redundancies=redundancies,
        window_steps=options.window_steps,
        refresh_steps=options.refresh_steps,
        progress=console.print,
    )
    start = balancedness_of_start(windows, world)
    if options.pictures is not None:
        figure = draw_replay(outcomes, f"{options.trace.name}: plan on one window, score on the next")
        report_pictures(save(figure, options.pictures, "replay"))
    document = {"balancedness_of_start": start, "outcomes": [outcome.document() for outcome in outcomes]}
    write_or_print(document, replay_table(outcomes, start), out=options.out, as_json=options.json)
    return 0


def run_redundancy(options: argparse.Namespace) -> int:
    """How many redundant experts pay for their memory on this trace."""
    EPLB_POLICIES.check(options.policy)
    given = _counts(options.redundant, "--redundant") if options.redundant else []
    trace, world = _start(options)
    counts = given or _steps_of_ranks(trace, world)
    outcomes = replay(
        trace,
        world,
        policies=[options.policy],
        redundancies=sorted({0, *counts}),
        window_steps=options.window_steps,
        refresh_steps=options.refresh_steps,
        progress=console.print,
    )
    gains = redundancy_curve(outcomes, world, trace.count_SLE.shape[1])
    chosen = worthwhile(gains, options.least_gain / 100)
    if options.pictures is not None:
        report_pictures(save(draw_redundancy(gains, chosen), options.pictures, "redundancy"))
    document: dict[str, object] = {
        "policy": options.policy,
        "least_gain_percent": options.least_gain,
        "worthwhile": chosen,
        "curve": [asdict(gain) for gain in gains],
    }
    write_or_print(document, redundancy_table(gains, chosen), out=options.out, as_json=options.json)
    return 0


def run_record(options: argparse.Namespace) -> int:
    """Record the expert load of every step while answering prompts."""
    _check_folder(options.out)
    if options.out.suffix != ".safetensors":
        raise ConfigError(f"--out {options.out} must end in .safetensors")
    if options.max_tokens < 1:
        raise ConfigError(f"--max-tokens must be at least 1, not {options.max_tokens}")
    engine = {name: getattr(options, name) for name in ENGINE_OPTIONS if getattr(options, name) is not None}
    # Reached by name: it needs torch, which the other commands must not wait for.
    record: Any = import_target("moe_serve.cli.eplb_record:record", "command", "eplb record")
    trace: Trace = record(options.model, options.prompts, max_tokens=options.max_tokens, options=engine)
    write_trace(options.out, trace)
    console.print(f"wrote {options.out}", soft_wrap=True)
    document = {name: value if name in WORDS else int(value) for name, value in trace.metadata.items()}
    print_facts(document, as_json=options.json)
    return 0


def _start(options: argparse.Namespace) -> tuple[Trace, ReplayWorld]:
    _check_folder(options.out)
    if options.pictures is not None:
        new_figure()  # a missing library is said before the work
    console.print(f"reading {options.trace}", soft_wrap=True)
    trace = read_trace(options.trace)
    check_load(trace.count_SLE.sum(axis=0))
    world = ReplayWorld(
        options.ranks,
        options.nodes,
        options.groups,
        options.expert_bytes,
        options.row_microseconds * 1e-6,
        options.expert_microseconds * 1e-6,
    )
    return trace, world


def _steps_of_ranks(trace: Trace, world: ReplayWorld) -> list[int]:
    """A quarter of the ranks, half, as many, twice, four times: as far as the experts go."""
    ranks, experts = world.num_ranks, trace.count_SLE.shape[2]
    most = experts * (ranks - 1)
    return [count for count in (ranks // 4, ranks // 2, ranks, 2 * ranks, 3 * ranks, 4 * ranks) if 0 < count <= most]


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()] or list(EPLB_POLICIES)
    for name in names:
        EPLB_POLICIES.check(name)
    return names


def _counts(text: str, option: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} must be whole numbers with commas between, not {text!r}") from error
    if min(counts) < 0:
        raise ConfigError(f"{option} must not be negative, not {min(counts)}")
    return counts


def _check_folder(path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"--out {path} cannot be written: there is no folder {path.parent}")


def _parser() -> Parser:
    parser = Parser(prog="moe-serve eplb", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    plan = commands.add_parser("plan", help="plan a placement on a recorded load", description=run_plan.__doc__)
    plan.set_defaults(command=run_plan)
    plan.add_argument("load", type=Path, metavar="LOAD", help="recorded load: .safetensors, .npy, .npz or .pt")
    _add_world(plan)
    plan.add_argument("--redundant", type=int, default=0, help="redundant experts in each layer")
    plan.add_argument("--policy", default="sticky", help=f"one of {', '.join(EPLB_POLICIES)}")
    plan.add_argument("--current", type=Path, help="placement file to start from")
    plan.add_argument("--out", type=Path, help="placement file to write")
    _add_output(plan)
    _add_record(commands)
    for name, command in (("replay", run_replay), ("redundancy", run_redundancy)):
        replaying = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        replaying.set_defaults(command=command)
        replaying.add_argument("trace", type=Path, metavar="TRACE", help="recorded load with steps")
        _add_world(replaying)
        replaying.add_argument("--window-steps", type=int, default=50, help="steps to plan on; the next are scored")
        replaying.add_argument("--refresh-steps", type=int, default=24, help="steps that uneven shares are solved from")
        replaying.add_argument("--expert-bytes", type=int, default=0, help="size of one expert's weights in one layer")
        replaying.add_argument("--row-microseconds", type=float, default=1.0, help="time of one token in one expert")
        replaying.add_argument("--expert-microseconds", type=float, default=0.0, help="time to read one expert in use")
        replaying.add_argument("--out", type=Path, help="JSON file to write")
        _add_output(replaying)
        if command is run_replay:
            replaying.add_argument("--policies", default="", help=f"of {','.join(EPLB_POLICIES)}; all if not given")
            replaying.add_argument("--redundant", default="0", help="numbers of redundant experts, as 0,16,32")
        else:
            replaying.add_argument("--policy", default="sticky", help=f"one of {', '.join(EPLB_POLICIES)}")
            replaying.add_argument("--redundant", default="", help="as 0,16,32; by the number of ranks if not given")
            replaying.add_argument(
                "--least-gain", type=float, default=0.02, help="%% of a step that one redundant expert must save"
            )
    return parser


def _add_record(commands: Any) -> None:
    recording = commands.add_parser("record", help=run_record.__doc__, description=run_record.__doc__)
    recording.set_defaults(command=run_record)
    recording.add_argument("model", nargs="?", metavar="MODEL", help="as for `moe-serve serve`")
    recording.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        metavar="FILE.jsonl|TEXT",
        help='texts, and files whose lines are texts or objects with "prompt" or "messages"',
    )
    recording.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    recording.add_argument("--max-tokens", type=int, default=128, help="longest answer to each prompt")
    for name, (kind, meaning) in ENGINE_OPTIONS.items():
        recording.add_argument("--" + name.replace("_", "-"), type=kind, help=meaning)
    recording.add_argument("--json", action="store_true", help="print one JSON object instead of a list")


def _add_world(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, required=True, help="ranks that share the experts")
    parser.add_argument("--nodes", type=int, default=1, help="nodes the ranks are on")
    parser.add_argument("--groups", type=int, default=1, help="groups of neighbouring experts the router picks from")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=Path, help="folder for PNG and SVG pictures")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
