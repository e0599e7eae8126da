"""What counting the experts' load costs: `python -m bench.eplb_recorder_overhead --help`.

Two engines with the same weights in this process, one that watches the load and one that does not, take the same steps
by turns. Beside the difference of their steps (noisy) stand the parts that only the watching one has, measured alone:
counting after the forward pass, and the hashes and kinds of rows before it; and, every so many steps, collecting.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console

from bench.command import keep
from bench.report import Report
from moe_serve.base.commands import AllocateKV, Meeting
from moe_serve.base.config import Config
from moe_serve.base.progress import Progress
from moe_serve.base.sampling import SamplingParams
from moe_serve.cli.random_model import make_model
from moe_serve.engine.core import EngineCore
from moe_serve.engine.process import COLLECTIONS_PER_WINDOW
from moe_serve.executor.uni import UniExecutor
from moe_serve.launch.resolve import resolve

PROMPT_TOKENS = 16
WARM_UP_STEPS = 20
console = Console(stderr=True)


@dataclass(slots=True)
class Clock:
    """Seconds of each call of a function that it was put around."""

    seconds: list[float] = field(default_factory=list)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            answer = function(*args, **options)
            self.seconds.append(time.perf_counter() - started)
            return answer

        return timed

    def median(self) -> float:
        return statistics.median(self.seconds or [0.0])


class Engine:
    """One rank in this process, with clocks around its steps and around the parts that watching touches."""

    def __init__(self, folder: Path, options: argparse.Namespace, *, watches: bool) -> None:
        config, model = resolve(
            Config.from_flat(
                {
                    "model": str(folder),
                    "dtype": options.dtype,
                    "enable_expert_parallel": True,
                    "kv_cache_memory_bytes": 1 << 28,
                    "max_model_len": PROMPT_TOKENS + options.steps + WARM_UP_STEPS + 2,
                }
            )
        )
        nowhere = Meeting.of_nobody(options.threads)
        executor = UniExecutor(config, nowhere, Progress(), watches_load=watches)
        facts = executor.start()
        executor.submit(AllocateKV(facts.kv_blocks)).result()
        self.model = model
        self.core = EngineCore(
            executor,
            config=config,
            num_blocks=facts.kv_blocks,
            max_model_len=config.model.max_model_len or 0,
            vocab_size=model.vocab_size,
            eos_token_ids=(),
        )
        self.steps, self.build, self.add, self.collect = Clock(), Clock(), Clock(), Clock()
        self._interval = max(1, config.parallel.eplb_config.window_size // COLLECTIONS_PER_WINDOW)
        self._step = 0
        assert executor._worker is not None
        runner: Any = executor._worker._runner
        runner._table.build = self.build.around(runner._table.build)
        if watches:
            recorder = runner._balance._recorder
            recorder.add = self.add.around(recorder.add)
            recorder.take = self.collect.around(recorder.take)

    def begin(self, num_sequences: int, max_tokens: int) -> None:
        """Queue sequences and compute their prompts; from then on every step decodes one token of each."""
        numbers = random.Random(0)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        for number in range(num_sequences):
            prompt = [numbers.randrange(3, self.model.vocab_size) for _ in range(PROMPT_TOKENS)]
            self.core.add(f"{number}", prompt, sampling)
        self.core.step()

    def step(self) -> None:
        """One step, with collecting as often as a server would."""
        self._step += 1
        collect = self._step % self._interval == 0
        started = time.perf_counter()
        plan = self.core.schedule()
        self.core.end(self.core.begin(msgspec.structs.replace(plan, step=self._step, collect_load=collect)))
        self.steps.seconds.append(time.perf_counter() - started)

    def forget(self) -> None:
        """The steps so far were to warm up."""
        for clock in (self.steps, self.build, self.add):
            clock.seconds.clear()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(options, make_model(Path(folder) / "model", preset=options.preset))
    for name, value in report.numbers.items():
        console.print(f"{name:32}{value}")
    keep(report, options.out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=["tiny", "small"])
    parser.add_argument("--sequences", type=int, default=32, help="that are decoded at the same time")
    parser.add_argument("--steps", type=int, default=500, help="of each engine")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1, help="that torch computes with")
    parser.add_argument("--out", type=Path, help="folder for the JSON file; this machine's if not given")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, folder: Path) -> Report:
    engines = [Engine(folder, options, watches=watches) for watches in (False, True)]
    for engine in engines:
        engine.begin(options.sequences, options.steps + WARM_UP_STEPS + 2)
    for number in range(WARM_UP_STEPS + options.steps):
        if number == WARM_UP_STEPS:
            for engine in engines:
                engine.forget()
        for engine in engines if number % 2 else reversed(engines):  # who goes first finds other caches
            engine.step()
    plain, watching = engines
    config = {name: getattr(options, name) for name in ("preset", "sequences", "steps", "dtype", "threads")}
    label = f"{options.preset}-{options.dtype}-{options.sequences}-sequences"
    return Report("eplb_recorder_overhead", label, config, numbers_of(plain, watching))


def numbers_of(plain: Engine, watching: Engine) -> dict[str, object]:
    """Medians, since other programs only ever add to a time."""
    step = plain.steps.median()
    add = statistics.fmean(watching.add.seconds)  # most calls only take note, one in several counts
    inputs = watching.build.median() - plain.build.median()
    collect = watching.collect.median() / watching._interval
    pairs = [with_ - without for with_, without in zip(watching.steps.seconds, plain.steps.seconds, strict=True)]
    return {
        "step_ms": round(step * 1e3, 3),
        "add_us": round(add * 1e6, 2),
        "hashes_us": round(inputs * 1e6, 2),
        "collect_us_per_step": round(collect * 1e6, 2),
        "parts_percent_of_step": round((add + inputs + collect) / step * 100, 3),
        "difference_percent_of_step": round(statistics.median(pairs) / step * 100, 3),
    }


if __name__ == "__main__":
    main()
