"""Prompts out of the held-out samples of the default model's domains."""

from __future__ import annotations

import random
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
