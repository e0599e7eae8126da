"""What the examples share: their options, prompts of one's own DP rank, and answers as lines of JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_serve.base.errors import ConfigError
from moe_serve.base.sampling import SamplingParams
from moe_serve.llm import LLM

PROMPTS = (
    "The expert that was asked most often",
    "Once upon a time",
    "def main():",
    "El tren llega a",
    "A token travels to",
)


def parser_for(about: str) -> argparse.ArgumentParser:
    """The options of all examples."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", help="model folder or name on the Hugging Face hub; the small default model"
    )
    parser.add_argument("-tp", "--tensor-parallel-size", type=int, default=1)
    parser.add_argument("-ep", "--enable-expert-parallel", action="store_true")
    parser.add_argument(
        "--prompts", type=Path, help="file with a prompt on each line; those of a DP rank are every n-th"
    )
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, help="of sampling; greedy without one")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other option of LLM, such as dtype=float32",
    )
    return parser


def engine_options(given: argparse.Namespace) -> dict[str, object]:
    """As LLM takes them, but for the model."""
    return {
        "tensor_parallel_size": given.tensor_parallel_size,
        "enable_expert_parallel": given.enable_expert_parallel,
        **dict(option.partition("=")[::2] for option in given.option),
    }


def answer(llm: LLM, given: argparse.Namespace) -> None:
    """Generate from this DP rank's prompts; a line of JSON for each answer. All processes do this together."""
    prompts: Sequence[str] = PROMPTS if given.prompts is None else given.prompts.read_text("utf-8").splitlines()
    mine = prompts[llm.data_parallel_rank :: llm.config.parallel.data_parallel_size]
    sampling = SamplingParams(
        max_tokens=given.max_tokens, temperature=0.0 if given.seed is None else 1.0, seed=given.seed
    )
    for output in llm.generate(list(mine), sampling):
        line = {
            "process": llm.process_number,
            "data_parallel_rank": llm.data_parallel_rank,
            "prompt": output.prompt,
            "token_ids": output.outputs[0].token_ids,
            "text": output.outputs[0].text,
        }
        sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def run(main: Callable[[], None]) -> int:
    """The exit code: 2 for a mistake of the operator's, which is one sentence."""
    try:
        main()
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0
