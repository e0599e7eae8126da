"""LLM on a tiny checkpoint, in this process: forms of prompts, the folder's defaults, what is wrong, and failures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_serve import LLM, RequestError, SamplingParams
from moe_serve.base.errors import ConfigError, ContextTooLong
from moe_serve.cli.random_model import make_model

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
DEFAULTS = {"temperature": 0.0, "top_k": 5, "repetition_penalty": 1.3}
TEXT = "In the beginning"
MESSAGES = [{"role": "user", "content": "Tell me more."}]
POISON = 7
"""A token whose embedding is NaN: whoever has it in its prompt gets logits that are not finite."""


def make_folder(folder: Path) -> Path:
    make_model(folder=folder, preset="tiny", arch="qwen3_moe", seed=0)
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | DEFAULTS | {"do_sample": True}))
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = make_folder(tmp_path_factory.mktemp("tiny") / "model")
    with LLM(folder, dtype="float32", max_model_len=64, kv_cache_memory_bytes=2**22) as llm:
        yield llm


def texts(llm: LLM, prompts: object, params: object = GREEDY) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(prompts, params, show_progress=False)]  # type: ignore[arg-type]


def test_a_prompt_is_the_same_in_every_form(llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXT)
    expected = texts(llm, TEXT)
    forms = ({"prompt": TEXT}, {"prompt_token_ids": ids}, [{"prompt": TEXT}], [ids], tuple(ids), np.array(ids))
    for prompts in (*forms, (text for text in [TEXT])):
        assert texts(llm, prompts) == expected, prompts
    shown = llm.generate([{"prompt": TEXT}, {"prompt_token_ids": ids}], GREEDY, show_progress=False)
    assert [output.prompt for output in shown] == [TEXT, None]
    assert [output.prompt_token_ids for output in shown] == [ids, ids]


def test_without_params_the_model_folders_defaults_count(llm: LLM) -> None:
    asked = SamplingParams(**DEFAULTS)  # type: ignore[arg-type]
    assert llm.default_params == asked
    prompts = [TEXT, "def main("]
    assert texts(llm, prompts, None) == texts(llm, prompts, asked) == texts(llm, prompts, [None, asked])
    warm = SamplingParams(seed=1, max_tokens=16)
    assert texts(llm, TEXT, warm) != texts(llm, TEXT, None), "these defaults have an effect"


def test_no_prompts_have_no_answers(llm: LLM) -> None:
    assert llm.generate([], show_progress=False) == []
    assert llm.chat([], show_progress=False) == []


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        ([TEXT, ""], GREEDY, r"^prompts\[1\]: the prompt must have at least one token"),
        ([TEXT, []], GREEDY, r"^prompts\[1\]: the prompt must have at least one token"),
        ([[1], [1, -1]], GREEDY, r"^prompts\[1\]: prompt holds token id -1, outside the vocabulary"),
        ([[1], [10**30]], GREEDY, r"^prompts\[1\]: prompt holds token id 1000.* outside the vocabulary"),
        ([[1], [1] * 64], GREEDY, r"^prompts\[1\]: the prompt has 64 tokens"),
        ([TEXT, {"prompt": "\ud800"}], GREEDY, r"^prompts\[1\]: the text is not valid Unicode"),
        ([TEXT, TEXT], [None, SamplingParams(stop_token_ids=(10**6,))], r"^prompts\[1\]: stop_token_ids"),
        ([TEXT, {"text": TEXT}], GREEDY, r"^prompts\[1\] has 'text'"),
        ([TEXT, TEXT], [GREEDY], "1 sampling params for 2 prompts"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_cannot_be_is_refused_before_anything_runs(llm: LLM, prompts: object, params: object, words: str) -> None:
    steps = llm._engines.core.report().steps  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match=words):
        llm.generate(prompts, params, show_progress=False)  # type: ignore[arg-type]
    assert llm._engines.core.report().steps == steps  # type: ignore[attr-defined]
    assert not llm._engines.core.has_work  # type: ignore[attr-defined]


def test_a_prompt_that_is_too_long_keeps_its_class(llm: LLM) -> None:
    with pytest.raises(ContextTooLong):
        llm.generate([[1] * 64], show_progress=False)


def test_chat_takes_one_conversation_or_several_and_names_what_is_wrong(llm: LLM) -> None:
    (one,) = llm.chat(MESSAGES, GREEDY, show_progress=False)
    assert one.prompt == llm.tokenizer.render_chat(MESSAGES)
    several = llm.chat([MESSAGES, tuple(MESSAGES)], GREEDY, show_progress=False)
    assert [output.outputs[0].text for output in several] == [one.outputs[0].text] * 2
    with pytest.raises(RequestError, match=r"^conversation 1: messages.0.role must be a string"):
        llm.chat([MESSAGES, [{"content": "x"}]], GREEDY, show_progress=False)
    with pytest.raises(RequestError, match=r"messages\[0\] must be a list of messages"):
        llm.chat("hello", show_progress=False)  # type: ignore[arg-type]


def test_a_request_that_fails_in_the_engine_says_so_and_the_others_finish(llm: LLM) -> None:
    alone = texts(llm, [TEXT, "def main("])
    ids = [*llm.tokenizer.encode(TEXT), POISON]
    params = [GREEDY, SamplingParams(temperature=0, max_tokens=6, n=2), GREEDY]
    first, bad, last = llm.generate([TEXT, ids, "def main("], params, show_progress=False)
    assert [first.outputs[0].text, last.outputs[0].text] == alone
    assert (first.outputs[0].finish_reason, first.outputs[0].error) == ("length", None)
    assert [choice.finish_reason for choice in bad.outputs] == ["error", "error"]
    assert all("finite" in (choice.error or "") for choice in bad.outputs)
    assert not llm._engines.core.has_work  # type: ignore[attr-defined]
    assert texts(llm, [TEXT, "def main("]) == alone


@pytest.mark.long
@pytest.mark.ranks
@pytest.mark.slow
def test_in_a_world_of_several_ranks_too_a_failed_answer_ends_nobody_else(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    with LLM(str(folder), dtype="float32", max_model_len=64, data_parallel_size=2, enable_expert_parallel=True) as llm:
        ids = [*llm.tokenizer.encode(TEXT), POISON]
        first, bad, last = llm.generate([TEXT, ids, TEXT], GREEDY, show_progress=False)
        assert first.outputs[0].text == last.outputs[0].text
        assert (first.outputs[0].finish_reason, bad.outputs[0].finish_reason) == ("length", "error")
        assert "finite" in (bad.outputs[0].error or "")
        with pytest.raises(RequestError, match=r"^prompts\[1\]: prompt holds token id -1"):
            llm.generate([TEXT, [-1]], GREEDY, show_progress=False)


def test_api_servers_are_not_for_llm() -> None:
    with pytest.raises(ConfigError, match=r"api_server_count \(2\) is for `moe-serve serve`"):
        LLM(api_server_count=2)
