"""Throughput of LLM.generate beside transformers' batched generate: `python -m bench.offline --help`.

Both run in this process, by turns, on the same new prompts each time, in the same type, on the same cores and with
the same thread policy. Greedy, so that the tokens can be compared too. The median of the repetitions counts.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.command import keep, parser_for
from bench.report import Report, spread
from moe_serve.world.member import spin_environment

Prompts = list[list[int]]
Generate = Callable[[Prompts], Prompts]
console = Console(stderr=True)


@dataclass(frozen=True, slots=True)
class Run:
    """One contestant's repetitions; `answers[i]` the tokens it gave for the prompts of repetition i."""

    seconds: list[float]
    answers: list[Prompts]

    def tokens_per_second(self) -> list[float]:
        return [sum(map(len, answer)) / seconds for answer, seconds in zip(self.answers, self.seconds, strict=True)]


def main() -> None:
    options = parse()
    limit_cores(options.cores, options.wait_policy)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(options, Path(options.model) if options.model else make_checkpoint(options, Path(folder)))
    show(report)
    keep(report, options.out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    parser.add_argument("--model", help="checkpoint folder; a random one of --preset and --arch if not given")
    parser.add_argument("--preset", default="tiny", choices=["tiny", "small"])
    parser.add_argument("--arch", default="qwen3_moe")
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--repetitions", type=int, default=5, help="of each contestant, after one that does not count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--data-parallel-size", type=int, default=1)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--enable-expert-parallel", action="store_true")
    parser.add_argument("--all2all-backend", default="auto")
    parser.add_argument("--cores", type=int, help="use only so many; all if not given")
    parser.add_argument(
        "--wait-policy", choices=["PASSIVE", "ACTIVE"], help="of idle OMP threads; moe_serve's own if not given"
    )
    parser.add_argument("--alone", action="store_true", help="without transformers")
    return parser.parse_args(arguments)


def limit_cores(cores: int | None, wait_policy: str | None) -> None:
    """Keep this process and its children to `cores`. To be called before torch is imported, which reads the rest."""
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    os.environ.update(spin_environment() if wait_policy is None else {"OMP_WAIT_POLICY": wait_policy})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def make_checkpoint(options: argparse.Namespace, folder: Path) -> Path:
    from moe_serve.cli.random_model import make_model

    return make_model(folder / "model", preset=options.preset, arch=options.arch, seed=options.seed)


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """Alternating repetitions of all contestants."""
    from moe_serve.base.model_config import load_model_config
    from moe_serve.llm import LLM

    prompts = [
        random_prompts(
            options.num_requests, options.input_len, load_model_config(folder).vocab_size, options.seed + repetition
        )
        for repetition in range(options.repetitions + 1)
    ]
    parallel = {
        name: getattr(options, name)
        for name in ("data_parallel_size", "tensor_parallel_size", "enable_expert_parallel", "all2all_backend")
    }
    with LLM(
        str(folder),
        dtype=options.dtype,
        enable_prefix_caching=False,
        max_model_len=options.input_len + options.output_len,
        **parallel,
    ) as llm:
        contestants = {"moe_serve": ours(llm, options.output_len)}
        if not options.alone:
            contestants["transformers"] = theirs(folder, options.dtype, options.output_len)
        runs = alternate(contestants, prompts)
    sizes = {name: getattr(options, name) for name in ("num_requests", "input_len", "output_len", "repetitions")}
    kept = {name: getattr(options, name) for name in ("dtype", "seed", "wait_policy")}
    model = options.model and Path(options.model).name
    config = {"model": model or f"{options.preset} {options.arch}", **sizes, **kept, **parallel}
    return Report("offline", options.label or label_of(options), config, numbers_of(runs))


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> Prompts:
    """New for every repetition: nothing computed before may be of use."""
    generator = random.Random(seed)
    return [[generator.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def ours(llm: Any, output_len: int) -> Generate:
    from moe_serve import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)

    def generate(prompts: Prompts) -> Prompts:
        return [answer.outputs[0].token_ids for answer in llm.generate(prompts, params, show_progress=False)]

    return generate


def theirs(folder: Path, dtype: str, output_len: int) -> Generate:
    """transformers with its own choice of kernels. All prompts are of one length, so nothing is padded."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.eval()
    model.generation_config.eos_token_id = None  # every answer has its full length
    model.generation_config.pad_token_id = 0

    def generate(prompts: Prompts) -> Prompts:
        with torch.inference_mode():
            both = model.generate(torch.tensor(prompts), max_new_tokens=output_len, do_sample=False)
        answers: Prompts = both[:, len(prompts[0]) :].tolist()
        return answers

    return generate


def alternate(contestants: dict[str, Generate], prompts: list[Prompts]) -> dict[str, Run]:
    """Everybody on the same prompts, then everybody on the next; the first ones warm up and do not count."""
    runs = {name: Run([], []) for name in contestants}
    for repetition, batch in enumerate(prompts):
        for name, generate in contestants.items():
            started = time.perf_counter()
            answers = generate(batch)
            seconds = time.perf_counter() - started
            console.print(f"{'warm-up' if not repetition else f'repetition {repetition}'}: {name} {seconds:.2f} s")
            if repetition:
                runs[name].seconds.append(seconds)
                runs[name].answers.append(answers)
    return runs


def numbers_of(runs: dict[str, Run]) -> dict[str, object]:
    speeds = {name: run.tokens_per_second() for name, run in runs.items()}
    numbers: dict[str, object] = {f"{name}_output_tokens_per_second": spread(values) for name, values in speeds.items()}
    if "transformers" in runs:
        pairs = list(zip(speeds["moe_serve"], speeds["transformers"], strict=True))
        numbers["ratio"] = spread([mine / other for mine, other in pairs], 2)
        numbers |= compare_tokens(runs["moe_serve"].answers, runs["transformers"].answers)
    return numbers


def compare_tokens(mine: list[Prompts], other: list[Prompts]) -> dict[str, object]:
    """How many answers are equal, token for token, and where the others part."""
    pairs = [pair for ours, theirs in zip(mine, other, strict=True) for pair in zip(ours, theirs, strict=True)]
    parted = [
        next((place for place, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
        for ours, theirs in pairs
        if ours != theirs
    ]
    return {"answers": len(pairs), "equal_answers": len(pairs) - len(parted), "first_difference": sorted(parted)[:10]}


def label_of(options: argparse.Namespace) -> str:
    ranks = f"dp{options.data_parallel_size}-tp{options.tensor_parallel_size}"
    spread_out = "-ep" if options.enable_expert_parallel else ""
    name = Path(options.model).name if options.model else f"{options.preset}-{options.arch}"
    return f"{name}-{options.dtype}-{ranks}{spread_out}"


def show(report: Report) -> None:
    table = Table(
        title=f"{report.config['num_requests']} requests, {report.config['input_len']} tokens in, "
        f"{report.config['output_len']} out, {report.config['dtype']}"
    )
    for column in ("", "output tokens/s (median)", "all repetitions"):
        table.add_column(column)
    for name, value in report.numbers.items():
        if isinstance(value, dict):
            table.add_row(name.removesuffix("_output_tokens_per_second"), str(value["median"]), str(value["all"]))
    console.print(table)
    if "answers" in report.numbers:
        console.print(f"{report.numbers['equal_answers']} of {report.numbers['answers']} answers equal")


if __name__ == "__main__":
    main()
