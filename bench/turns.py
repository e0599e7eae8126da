"""LLM.generate of two checkouts by turns of a second or so: `python -m bench.turns --before PATH --turns 30`.

Both stay loaded, and one sleeps while the other has its turn, so that a ratio compares neighbours in time. Where
`bench.pairs` must wait for the end of a benchmark, a machine has changed by more than a few percent meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from bench.command import add_checkouts, import_path, keep, parser_for
from bench.contestants import Contestant
from bench.offline import make_checkpoint, random_prompts
from bench.pairs import commit_of, compare_one, show
from bench.report import Report

console = Console(stderr=True)


def start(checkout: Path, model: Path, llm: str) -> Contestant:
    """A child that has the LLM of one checkout, and generates when it is told to."""
    told = [sys.executable, "-P", Path(__file__).with_name("contestant.py"), model, llm]
    return Contestant(told, {**os.environ, "PYTHONPATH": import_path(checkout)}, checkout)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(options.model) if options.model else make_checkpoint(options, Path(folder))
        report = measure(options, model)
    show(report)
    keep(report, options.out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__, label="before-after")
    add_checkouts(parser)
    parser.add_argument("--turns", type=int, default=30, help="of each, after two that do not count")
    parser.add_argument("--model", help="checkpoint folder; a random one of --preset and --arch if not given")
    parser.add_argument("--preset", default="tiny", choices=["tiny", "small"])
    parser.add_argument("--arch", default="qwen3_moe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--llm", default='{"dtype": "float32"}', help="options of LLM as JSON")
    parser.add_argument("--llm-before", help="others for the LLM of --before, which may be the same checkout")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, model: Path) -> Report:
    before = options.llm_before or options.llm
    sides = [start(options.before, model, before), start(options.after, model, options.llm)]
    seconds: list[list[float]] = [[], []]
    equal = answers = 0
    for number in track(range(options.turns + 2), description="turns", console=console):
        prompts = random_prompts(options.num_requests, options.input_len, 1000, options.seed + number)
        order = (0, 1) if number % 2 == 0 else (1, 0)
        given = {side: sides[side].ask(prompts=prompts, output_len=options.output_len) for side in order}
        if number >= 2:
            for side in order:
                seconds[side].append(given[side]["seconds"])
            answers += len(prompts)
            equal += sum(one == other for one, other in zip(*(given[side]["answers"] for side in (0, 1)), strict=True))
    for side in sides:
        side.close()
    tokens = options.num_requests * options.output_len
    speeds = [[tokens / each for each in side] for side in seconds]
    sizes = {name: getattr(options, name) for name in ("turns", "num_requests", "input_len", "output_len", "seed")}
    name = Path(options.model).name if options.model else f"{options.preset} {options.arch}"
    config = {
        "benchmark": " after ".join(f"LLM({llm})" for llm in dict.fromkeys((options.llm, before))) + f" on {name}",
        "before": commit_of(options.before),
        "after": commit_of(options.after),
        **sizes,
        "equal_answers": equal,
        "answers": answers,
    }
    return Report("turns", options.label, config, {"output_tokens_per_second": compare_one(*speeds)})


if __name__ == "__main__":
    main()
