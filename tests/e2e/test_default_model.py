"""The model that comes with the package: it has learned its domains, and its experts have divided them up."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import moe_serve
from moe_serve import LLM, SamplingParams

MODEL = Path(moe_serve.__file__).parent / "assets" / "default-model"
SAMPLES = Path(__file__).parents[1] / "data" / "default_model"
BIGRAMS = json.loads((SAMPLES / "bigram.json").read_text())
WINDOW = 1024
PROMPTS = ["In the beginning", "def main(", "En el principio", ".. function:: open("]
CHAT = [{"role": "user", "content": "And it came to pass"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(MODEL), dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def test_the_folder_has_all_files_and_at_most_25_megabytes() -> None:
    names = {path.name for path in MODEL.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert {"model.safetensors", "MODEL_CARD.md"} <= names
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 25e6


def test_greedy_tokens_equal_transformers(
    llm: LLM, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    prompts = [tokenizer(text)["input_ids"] for text in [*PROMPTS, chat]]
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    ours = [output.outputs[0].token_ids for output in llm.generate(prompts, params, show_progress=False)]
    for prompt, answer in zip(prompts, ours, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=48, min_new_tokens=48, eos_token_id=None
        )
        assert theirs[0, len(prompt) :].tolist() == answer


def test_the_tokenizer_and_chat_template_read_as_transformers_reads_them(
    llm: LLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = (SAMPLES / "spanish.txt").read_text(encoding="utf-8")[:4000]
    assert llm.tokenizer.encode(text) == tokenizer(text)["input_ids"]
    assert llm.tokenizer.decode(llm.tokenizer.encode(text)) == text
    assert llm.tokenizer.render_chat(CHAT) == tokenizer.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    "domain", [pytest.param(name, marks=() if name == "python" else pytest.mark.long) for name in BIGRAMS]
)
def test_held_out_text_is_far_likelier_than_to_a_byte_bigram(llm: LLM, domain: str) -> None:
    text = (SAMPLES / f"{domain}.txt").read_text(encoding="utf-8")
    ids = llm.tokenizer.encode("<|endoftext|>" + text)
    # Windows share one token, so that each but the first is scored once.
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - 1, WINDOW - 1)]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate(windows, params, show_progress=False)
    scores = [entry.logprob for output in outputs for entry in output.prompt_logprobs or []]
    assert len(scores) == len(ids) - 1
    bits_per_byte = -math.fsum(scores) / math.log(2) / len(text.encode())
    assert bits_per_byte < 0.7 * BIGRAMS[domain]["bigram_bits_per_byte"]


def test_completions_look_like_their_domain(llm: LLM) -> None:
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=60, n=4)
    prose, code = llm.generate(["And it came to pass", "def main("], params, show_progress=False)
    words = " ".join(choice.text for choice in prose.outputs).lower().split()
    assert {"the", "and", "that", "unto"} <= set(words)
    assert "self" not in words
    assert sum(":\n    " in choice.text for choice in code.outputs) >= 3


def test_a_chat_answer_ends_by_itself(llm: LLM) -> None:
    answers = llm.chat([CHAT] * 4, SamplingParams(temperature=0.7, seed=1, max_tokens=600), show_progress=False)
    assert any(answer.outputs[0].finish_reason == "stop" for answer in answers)


def test_domains_use_different_experts(reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prose, code = (expert_shares(reference, tokenizer, domain) for domain in ("prose", "python"))
    assert abs(prose - code).sum(-1).mean() / 2 > 0.25  # of the work, this much goes elsewhere


@torch.no_grad()
def expert_shares(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, domain: str) -> np.ndarray:
    """(layers, experts): what share of a layer's work each expert does."""
    text = (SAMPLES / f"{domain}.txt").read_text(encoding="utf-8")
    tokens = torch.tensor([tokenizer(text)["input_ids"][:2048]])
    logits = torch.stack(model(tokens, output_router_logits=True).router_logits)
    chosen = logits.topk(model.config.num_experts_per_tok, dim=-1).indices.flatten(1)
    return (
        torch.stack([layer.bincount(minlength=model.config.num_experts) for layer in chosen]).numpy()
        / chosen[0].numel()
    )
