"""Requests of several lengths, and what an engine of one rank, without a network, answers to them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import httpx

from moe_serve import LLM, SamplingParams


def bodies(count: int) -> list[dict[str, object]]:
    lengths = itertools.cycle((4, 9, 16, 30))
    prompts = [f"number {number % 40}" + " and so on" * (number % 7) for number in range(count)]
    return [{"prompt": prompt, "max_tokens": next(lengths), "temperature": 0, "ignore_eos": True} for prompt in prompts]


def expected(model: str, asked: Sequence[dict[str, object]]) -> dict[tuple[str, int], str]:
    """By prompt and number of tokens; in float32."""
    each = {_key(body) for body in asked}
    with LLM(model, dtype="float32", max_model_len=512) as llm:
        order = sorted(each)
        params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for _, length in order]
        outputs = llm.generate([prompt for prompt, _ in order], params, show_progress=False)
        return {key: output.outputs[0].text for key, output in zip(order, outputs, strict=True)}


def assert_right(
    asked: Sequence[dict[str, object]], answers: Sequence[httpx.Response], right: dict[tuple[str, int], str]
) -> None:
    for body, answer in zip(asked, answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == right[_key(body)]


def _key(body: dict[str, object]) -> tuple[str, int]:
    return str(body["prompt"]), int(str(body["max_tokens"]))
