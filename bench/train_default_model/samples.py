"""Test data: a little of each domain's held-out text, and what a byte-bigram model of the training text gives it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np


def write_samples(
    training: dict[str, dict[str, str]], held: dict[str, dict[str, str]], folder: Path, num_bytes: int, seed: int
) -> None:
    """FOLDER/DOMAIN.txt, whole held-out documents of at most `num_bytes` in all, and FOLDER/bigram.json."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = {}
    for domain, documents in held.items():
        text = "\n".join(_some(documents, num_bytes, seed))
        (folder / f"{domain}.txt").write_text(text, encoding="utf-8")
        scores[domain] = {
            "num_bytes": len(text.encode()),
            "bigram_bits_per_byte": round(bigram_bits("\n".join(training[domain].values()), text), 4),
        }
    (folder / "bigram.json").write_text(json.dumps(scores, indent=1) + "\n")


def _some(documents: dict[str, str], num_bytes: int, seed: int) -> list[str]:
    names = sorted(documents)
    random.Random(seed).shuffle(names)
    chosen: list[str] = []
    for name in names:
        size = len(documents[name].encode())
        if size + sum(len(text.encode()) for text in chosen) <= num_bytes:
            chosen.append(documents[name])
    return chosen


def bigram_bits(training: str, text: str) -> float:
    """Mean bits per byte of `text`, each byte given the one before; counts in `training` plus 0.1."""
    seen = np.frombuffer(training.encode(), dtype=np.uint8).astype(np.int64)
    counts = np.bincount(seen[:-1] * 256 + seen[1:], minlength=65536).reshape(256, 256) + 0.1
    chances = counts / counts.sum(1, keepdims=True)
    read = np.frombuffer(text.encode(), dtype=np.uint8)
    return float(-np.log2(chances[read[:-1], read[1:]]).mean())
