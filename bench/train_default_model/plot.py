"""The loss curve: `python -m bench.train_default_model.plot LOG.json PICTURE.png`. Needs matplotlib."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.train_default_model.corpus import DOMAINS


def draw(log: list[dict[str, Any]], path: Path) -> None:
    """Training loss in bits per token on the left, held-out bits per byte of each domain on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = [entry for entry in log if "loss" in entry]
    left.plot([millions(entry) for entry in steps], [entry["loss"] / math.log(2) for entry in steps], linewidth=1)
    left.set_title("training, bits per token (all domains)", loc="left", fontsize=10)
    held = [entry for entry in log if "held_out" in entry]
    for domain in DOMAINS:
        right.plot(
            [millions(entry) for entry in held], [entry["held_out"][domain] for entry in held], "o-", label=domain
        )
    right.set_title("held out, bits per byte (512 tokens of context)", loc="left", fontsize=10)
    right.legend()
    for axis in (left, right):
        axis.set_xlabel("million tokens")
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def millions(entry: dict[str, Any]) -> float:
    return entry["tokens"] / 1e6


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
