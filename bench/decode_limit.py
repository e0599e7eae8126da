"""Decode with one request beside the machine's limit: `python -m bench.decode_limit --preset small`.

A token reads every weight that its experts and all else need, once. A turn takes the same prompt to its first token and
to its last, so that the difference is decode alone, and then reads plain memory with as many threads: the share is of
what the machine gives in that moment.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import safe_open

from bench.command import keep, parser_for
from bench.offline import make_checkpoint, ours, random_prompts
from bench.report import Report, spread
from moe_serve import LLM
from moe_serve.base.model_config import ModelConfig, load_model_config

MEMORY_BYTES = 1 << 30
console = Console(stderr=True)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(options.model) if options.model else make_checkpoint(options, Path(folder))
        report = measure(options, model)
    show(report)
    keep(report, options.out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    parser.add_argument("--model", help="checkpoint folder; a random one of --preset and --arch if not given")
    parser.add_argument("--preset", default="small", choices=["tiny", "small"])
    parser.add_argument("--arch", default="qwen3_moe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--input-len", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--output-len", type=int, default=65, help="tokens of the answer")
    parser.add_argument("--turns", type=int, default=15, help="after one that does not count")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, folder: Path) -> Report:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model_config = load_model_config(folder)
    needed = bytes_of_a_token(folder, model_config)
    memory = torch.ones(MEMORY_BYTES // 4)
    turns: list[tuple[float, float]] = []
    with LLM(folder, dtype="bfloat16", enable_prefix_caching=False) as llm:
        first, whole = ours(llm, 1), ours(llm, options.output_len)
        for turn in track(range(options.turns + 1), description="turns", console=console):
            prompt = random_prompts(1, options.input_len, model_config.vocab_size, options.seed + turn)
            decoding = seconds(partial(whole, prompt)) - seconds(partial(first, prompt))
            turns.append((decoding / (options.output_len - 1), seconds(memory.sum)))
    numbers = {
        "megabytes_of_a_token": spread([needed / 1e6]),
        "milliseconds_of_a_token": spread([1e3 * decoding for decoding, _ in turns[1:]]),
        "gigabytes_per_second": spread([needed / decoding / 1e9 for decoding, _ in turns[1:]]),
        "gigabytes_per_second_of_a_sum": spread([MEMORY_BYTES / reading / 1e9 for _, reading in turns[1:]]),
        "share": spread([needed / decoding / (MEMORY_BYTES / reading) for decoding, reading in turns[1:]], digits=3),
    }
    config = {
        "model": (options.model and Path(options.model).name) or f"{options.preset} {options.arch}",
        "input_len": options.input_len,
        "output_len": options.output_len,
        "turns": options.turns,
    }
    return Report("decode_limit", options.label or options.preset, config, numbers)


def bytes_of_a_token(folder: Path, config: ModelConfig) -> float:
    """Weights of one decode step in bfloat16: an embedding is one row, of the experts only those chosen."""
    numbers = 0.0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                many = math.prod(file.get_slice(name).get_shape())
                if ".experts." in name:
                    many *= config.router.top_k / config.num_experts
                if "embed_tokens" not in name or config.tie_word_embeddings:
                    numbers += many
    return 2 * numbers


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def show(report: Report) -> None:
    table = Table("number", "median", "least", "most")
    for name, found in report.numbers.items():
        assert isinstance(found, dict)
        table.add_row(name, *map(str, (found["median"], min(found["all"]), max(found["all"]))))
    console.print(table)


if __name__ == "__main__":
    main()
