"""Which experts each domain's text uses in the default model: `python -m bench.expert_load` writes JSON and a picture.

Counted with transformers, whose router is not ours. Balancedness is the mean over layers of (mean rank load / largest
rank load), 1 being even; "mix" is the same number of tokens of each domain. Needs matplotlib (the `bench` extra).
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_serve.eplb.placement import initial_placement

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RANKS = (4, 8)
Shares = NDArray[np.float64]  # (layers, experts), a layer's sum being 1


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    paths = sorted(options.texts.glob("*.txt"))
    if not paths:
        raise SystemExit(f"no *.txt in {options.texts}; give --texts")
    loads = {
        path.stem: expert_shares(model, tokenizer(path.read_text(encoding="utf-8"))["input_ids"], options.tokens)
        for path in paths
    }
    mix = np.mean(list(loads.values()), axis=0)
    report = {
        "tokens_per_domain": options.tokens,
        "shares": {name: shares.round(5).tolist() for name, shares in loads.items()},
        "balancedness": {
            f"{ranks} ranks": {name: balancedness(shares, ranks) for name, shares in {**loads, "mix": mix}.items()}
            for ranks in RANKS
        },
        # Half the sum of differences: the share of the work that other experts do when the topic changes.
        "difference": {
            f"{a} - {b}": round(float(abs(loads[a] - loads[b]).sum(-1).mean() / 2), 4)
            for a, b in itertools.combinations(loads, 2)
        },
    }
    print(json.dumps({key: report[key] for key in ("balancedness", "difference")}, indent=1))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report) + "\n")
    draw(loads, options.picture)


@torch.no_grad()
def expert_shares(model: torch.nn.Module, ids: list[int], num_tokens: int, window: int = 512) -> Shares:
    """The share of each layer's work that each expert does, over the first `num_tokens` of a text."""
    top_k, experts = model.config.num_experts_per_tok, model.config.num_experts
    counts = np.zeros((model.config.num_hidden_layers, experts))
    for start in range(0, min(num_tokens, len(ids)), window):
        tokens = torch.tensor([ids[start : start + window]])
        for layer, logits in enumerate(model(tokens, output_router_logits=True).router_logits):
            chosen = logits.topk(top_k, dim=-1).indices.flatten()
            counts[layer] += chosen.bincount(minlength=experts).numpy()
    return counts / counts.sum(-1, keepdims=True)


def balancedness(shares: Shares, num_ranks: int) -> float:
    """Of a linear placement: mean over layers of mean rank load / largest rank load."""
    layers, experts = shares.shape
    placement = initial_placement("linear", num_layers=layers, num_experts=experts, num_ranks=num_ranks)
    ratios = []
    for layer in range(layers):
        loads = [shares[layer, placement.logical_of(layer, rank)].sum() for rank in range(num_ranks)]
        ratios.append(np.mean(loads) / max(loads))
    return round(float(np.mean(ratios)), 4)


def draw(loads: dict[str, Shares], path: Path) -> None:
    """A heat-map per domain, layers x experts, on one scale: 1 is what an even load would give."""
    top = max(float(shares.max() * shares.shape[1]) for shares in loads.values())
    figure, axes = plt.subplots(len(loads), 1, figsize=(9, 1.9 * len(loads)), layout="constrained", sharex=True)
    for axis, (name, shares) in zip(np.atleast_1d(axes), loads.items(), strict=True):
        image = axis.imshow(shares * shares.shape[1], aspect="auto", cmap="magma", vmin=0, vmax=top)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_ylabel("layer")
        axis.set_yticks(range(shares.shape[0]))
    np.atleast_1d(axes)[-1].set_xlabel("expert")
    figure.colorbar(image, ax=axes, label="load (1 = even)", shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = ROOT / "moe_serve/assets/default-model"
    held_out = Path("~/.cache/moe-serve/train/held-out").expanduser()
    parser.add_argument("--model", type=Path, default=model, help="model folder (default: the shipped one)")
    parser.add_argument("--texts", type=Path, default=held_out, help="folder of DOMAIN.txt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=30_000, help="tokens of each domain (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=ROOT / "bench/default_model/expert-load.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/pictures/expert-load.png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
