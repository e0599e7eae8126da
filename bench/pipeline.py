"""Whether pipeline stages are kept busy: one flight and as many as stages by turns: `python -m bench.pipeline --help`.

One engine's workers, a stage each, stay loaded, every one with all its threads on a core of its own and one thread to
compute with. By turns, on the same new prompts, a core with one flight in the air and one with as many as there are
stages use them. Greedy, in float32 unless told otherwise, so that the answers can be compared too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.command import keep, parser_for
from bench.offline import Prompts, make_checkpoint, random_prompts
from bench.pairs import compare_one
from bench.report import Report, spread
from moe_serve.base.commands import AllocateKV, WorkerFacts
from moe_serve.base.config import Config
from moe_serve.base.model_config import ModelConfig
from moe_serve.base.progress import Progress
from moe_serve.base.sampling import SamplingParams
from moe_serve.engine.core import EngineCore
from moe_serve.executor.remote import RemoteExecutor
from moe_serve.executor.subprocesses import Subprocesses, WorkerChild
from moe_serve.launch.resolve import resolve
from moe_serve.worker.wire import ENVIRONMENT, Invitation
from tests.support.world import World

ALLOCATE_SECONDS = 300.0
WARM_UP_TURNS = 2
console = Console(stderr=True)


class PinnedSubprocesses(Subprocesses):
    """A Starter: worker i is a child on the core cores[i]."""

    def __init__(self, cores: Sequence[int]) -> None:
        self._cores = cores

    def start(self, worker: int, invitation: Invitation) -> WorkerChild:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self._cores[worker]})  # of this thread, and so of the child and all that it starts
        try:
            return super().start(worker, invitation)
        finally:
            os.sched_setaffinity(0, before)


class Pipeline:
    """The workers, and a core by number of flights over them; only one core has work at a time. A context manager."""

    def __init__(self, config: Config, model: ModelConfig, cores: Sequence[int]) -> None:
        self._config, self._model, self._pins = config, model, cores
        self._world = World(config.parallel.topology)
        self.cores: dict[int, EngineCore] = {}
        self.stages: list[psutil.Process] = []

    def __enter__(self) -> Self:
        self._world.__enter__()
        starter = PinnedSubprocesses(self._pins)
        self._executor = RemoteExecutor(self._config, self._world.meeting, Progress(), starter)
        facts = self._executor.start()
        self._executor.submit(AllocateKV(facts.kv_blocks)).result(timeout=ALLOCATE_SECONDS)
        self.cores = {flights: self._core(facts, flights) for flights in (1, len(self._pins))}
        workers = {_worker_of(child): child for child in psutil.Process().children() if _worker_of(child) is not None}
        self.stages = [workers[stage] for stage in range(len(self._pins))]
        self._check_pins()
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.close()
        self._world.__exit__()

    def _core(self, facts: WorkerFacts, flights: int) -> EngineCore:
        return EngineCore(
            self._executor,
            config=self._config,
            num_blocks=facts.kv_blocks,
            max_model_len=self._config.model.max_model_len or self._model.max_position_embeddings,
            vocab_size=self._model.vocab_size,
            eos_token_ids=self._model.eos_token_ids,
            max_flights=flights,
        )

    def _check_pins(self) -> None:
        for stage, core in zip(self.stages, self._pins, strict=True):
            allowed = {thread.id: os.sched_getaffinity(thread.id) for thread in stage.threads()}
            if any(cores != {core} for cores in allowed.values()):
                raise SystemExit(f"the worker with pid {stage.pid} was to stay on core {core}: {allowed}")


@dataclass(slots=True)
class Turns:
    """What one number of flights needed, turn by turn; `busy[stage]` shares of the time on its core."""

    seconds: list[float] = field(default_factory=list)
    answers: list[Prompts] = field(default_factory=list)
    busy: list[list[float]] = field(default_factory=list)


def main() -> None:
    options = parse()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < options.stages:
        raise SystemExit(f"{options.stages} stages need a core each, and this process may use {len(cores)}")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(options.model) if options.model else make_checkpoint(options, Path(folder))
        report = measure(options, model, cores[: options.stages])
    show(report)
    keep(report, options.out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--model", help="checkpoint folder; a random one of --preset and --arch if not given")
    parser.add_argument("--preset", default="tiny", choices=["tiny", "small"])
    parser.add_argument("--arch", default="qwen3_moe")
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--turns", type=int, default=12, help=f"of each, after {WARM_UP_TURNS} that do not count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args(arguments)
    if options.stages < 2:
        parser.error(f"--stages {options.stages}: with one there is nothing to compare")
    return options


def measure(options: argparse.Namespace, folder: Path, cores: Sequence[int]) -> Report:
    asked = {
        "model": str(folder),
        "dtype": options.dtype,
        "device": "cpu",
        "pipeline_parallel_size": options.stages,
        "max_model_len": options.input_len + options.output_len,
        "enable_prefix_caching": False,
    }
    config, model = resolve(Config.from_flat(asked))
    with Pipeline(config, model, cores) as pipeline:
        turns = alternate(pipeline, options, model.vocab_size)
    return report_of(options, turns)


def alternate(pipeline: Pipeline, options: argparse.Namespace, vocab_size: int) -> dict[int, Turns]:
    """By number of flights. Who goes first changes; the first turns warm up and do not count."""
    found = {flights: Turns() for flights in pipeline.cores}
    for number in track(range(WARM_UP_TURNS + options.turns), description="turns", console=console):
        prompts = random_prompts(options.num_requests, options.input_len, vocab_size, options.seed + number)
        order = list(pipeline.cores.items())
        for flights, core in order if number % 2 == 0 else reversed(order):
            before, started = cpu_seconds(pipeline.stages), time.perf_counter()
            answers = generate(core, prompts, options.output_len, f"turn {number}, {flights} in the air")
            seconds = time.perf_counter() - started
            if number >= WARM_UP_TURNS:
                used = zip(before, cpu_seconds(pipeline.stages), strict=True)
                found[flights].seconds.append(seconds)
                found[flights].answers.append(answers)
                found[flights].busy.append([(after - first) / seconds for first, after in used])
    return found


def generate(core: EngineCore, prompts: Prompts, output_len: int, name: str) -> Prompts:
    """All prompts at once to their end; the tokens of each answer."""
    sampling = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    answers: dict[str, list[int]] = {f"{name}, request {number}": [] for number in range(len(prompts))}
    for request, prompt in zip(answers, prompts, strict=True):
        core.add(request, prompt, sampling)
    while core.has_work:
        for event in core.step():
            answers[event.request_id] += event.token_ids
    if any(len(answer) != output_len for answer in answers.values()):
        raise SystemExit(f"{name}: an answer does not have {output_len} tokens")
    return list(answers.values())


def cpu_seconds(stages: Sequence[psutil.Process]) -> list[float]:
    """Time that each process has spent on a core."""
    times = [stage.cpu_times() for stage in stages]
    return [each.user + each.system for each in times]


def report_of(options: argparse.Namespace, turns: Mapping[int, Turns]) -> Report:
    model = Path(options.model).name if options.model else f"{options.preset} {options.arch}"
    sizes = ("stages", "num_requests", "input_len", "output_len", "turns", "seed", "dtype")
    config = {"model": model, **{name: getattr(options, name) for name in sizes}}
    label = options.label or f"{model.replace(' ', '-')}-{options.dtype}-pp{options.stages}"
    return Report("pipeline", label, config, numbers_of(options.num_requests * options.output_len, turns))


def numbers_of(num_tokens: int, turns: Mapping[int, Turns]) -> dict[str, object]:
    """`ratio` is that of neighbours, as many flights as stages to one."""
    speeds = {flights: [num_tokens / seconds for seconds in each.seconds] for flights, each in turns.items()}
    one, all_stages = turns.values()
    compared = compare_one(*speeds.values())
    pairs = [pair for both in zip(one.answers, all_stages.answers, strict=True) for pair in zip(*both, strict=True)]
    return {
        "output_tokens_per_second": {str(flights): spread(each) for flights, each in speeds.items()},
        "ratio": {
            "median": compared["ratio"],
            "quartiles": compared["ratio_quartiles"],
            "all": compared["ratios"],
        },
        "busy_share_of_stages": {
            str(flights): [round(statistics.median(stage), 2) for stage in zip(*each.busy, strict=True)]
            for flights, each in turns.items()
        },
        "answers": len(pairs),
        "equal_answers": sum(first == second for first, second in pairs),
    }


def show(report: Report) -> None:
    numbers: dict[str, dict[str, object]] = dict(report.numbers)  # type: ignore[arg-type]
    table = Table("flights", "output tokens/s (median)", "share of the time that each stage computes")
    for flights, speed in numbers["output_tokens_per_second"].items():
        assert isinstance(speed, dict)
        table.add_row(flights, str(speed["median"]), str(numbers["busy_share_of_stages"][flights]))
    console.print(table)
    ratio = numbers["ratio"]
    console.print(f"ratio {ratio['median']} (quartiles {ratio['quartiles']})", soft_wrap=True)
    console.print(f"{report.numbers['equal_answers']} of {report.numbers['answers']} answers equal")


def _worker_of(child: psutil.Process) -> int | None:
    """The index of a worker of this process's engine; None of another child."""
    environment = child.environ()
    return Invitation.from_environment(environment).worker if ENVIRONMENT in environment else None


if __name__ == "__main__":
    main()
