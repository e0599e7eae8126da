"""Bits per byte of held-out text, domain by domain, through the engine: `python -m bench.eval_default_model`.

Beside them what `xz -9e` needs for the same files. Every token is scored once, with at least half a context before it
(the first half context excepted, which begins after an end-of-text token).
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_serve import LLM, SamplingParams

HELD_OUT = Path("~/.cache/moe-serve/train/held-out").expanduser()


@dataclass(frozen=True)
class Score:
    """One file. `bits_per_byte` of the model and of xz; `saved` the share by which the model needs less."""

    num_bytes: int
    num_tokens: int
    bits_per_byte: float
    xz_bits_per_byte: float
    saved: float


def main() -> None:
    options = parse()
    paths = sorted(options.texts.glob("*.txt"))
    if not paths:
        raise SystemExit(f"no *.txt in {options.texts}: run bench.train_default_model first, or give --texts")
    with LLM(options.model, dtype=options.dtype) as llm:
        scores = {path.stem: score(llm, path.read_text(encoding="utf-8")) for path in paths}
    report(scores)
    if options.json:
        options.json.write_text(json.dumps({name: asdict(found) for name, found in scores.items()}, indent=1) + "\n")


def score(llm: LLM, text: str) -> Score:
    """The model's and xz's size of a text."""
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    (end_of_text,) = llm.tokenizer.encode("<|endoftext|>", add_special_tokens=False)
    nats = -math.fsum(log_likelihoods(llm, [end_of_text, *ids]))
    data = text.encode()
    bits = nats / math.log(2) / len(data)
    xz = 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)
    return Score(len(data), len(ids), round(bits, 4), round(xz, 4), round(1 - bits / xz, 4))


def log_likelihoods(llm: LLM, ids: list[int]) -> Iterator[float]:
    """Natural log-likelihood of each token but the first, given those before it within a sliding context."""
    context = (llm.config.model.max_model_len or 2048) - 1  # one place is for the token that generate() must make
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    starts = range(0, max(len(ids) - context, 0) + context // 2, context // 2)
    outputs = llm.generate([ids[start : start + context] for start in starts], params)
    done = 1
    for start, output in zip(starts, outputs, strict=True):
        found = output.prompt_logprobs or []  # of the prompt's tokens from the second on
        yield from (entry.logprob for entry in found[done - start - 1 :])
        done = max(done, start + len(output.prompt_token_ids))
    assert done == len(ids)


def report(scores: dict[str, Score]) -> None:
    print("| domain | bytes | tokens | bits per byte | xz -9e | less than xz |")
    print("|---|---|---|---|---|---|")
    for name, found in scores.items():
        print(
            f"| {name} | {found.num_bytes} | {found.num_tokens} | {found.bits_per_byte:.3f} "
            f"| {found.xz_bits_per_byte:.3f} | {found.saved:.1%} |"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder (default: the model that comes with moe-serve)")
    parser.add_argument("--texts", type=Path, default=HELD_OUT, help="folder of DOMAIN.txt (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32 (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
