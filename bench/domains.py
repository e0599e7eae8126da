"""Prompts out of the held-out samples of the default model's domains; as a file, the domains in turn:

python -m bench.domains prompts.jsonl
moe-serve eplb record --prompts prompts.jsonl --out topics.safetensors --max-num-seqs 8
python -m bench.eplb_balancedness --kinds --traces topics.safetensors --ranks 8 --nodes 1 --redundant 0 8
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from bench.steady_load import Prompt

SAMPLES = Path(__file__).resolve().parents[1] / "tests" / "data" / "default_model"


def domains() -> list[str]:
    """Names of the domains, in order."""
    return sorted(path.stem for path in SAMPLES.glob("*.txt"))


def prompts_of(domain: str, length: int) -> Prompt:
    """Pieces of so many characters from anywhere in a domain's sample."""
    text = (SAMPLES / f"{domain}.txt").read_text(encoding="utf-8")

    def prompt(numbers: random.Random) -> str:
        start = numbers.randrange(len(text) - length)
        return text[start : start + length]

    return prompt


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file to write, one prompt per line")
    parser.add_argument("--prompts", type=int, default=48, help="of each domain, in a row")
    parser.add_argument("--length", type=int, default=400, help="characters of each")
    parser.add_argument("--rounds", type=int, default=2, help="times through all domains")
    options = parser.parse_args(arguments)
    numbers = random.Random(0)
    makers = [prompts_of(name, options.length) for name in domains()] * options.rounds
    prompts = [maker(numbers) for maker in makers for _ in range(options.prompts)]
    options.out.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


if __name__ == "__main__":
    main()
