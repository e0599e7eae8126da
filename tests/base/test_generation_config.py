"""generation_config.json: what no request could satisfy is refused at start, what is not used is named once."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from moe_serve.base.config import Config
from moe_serve.base.errors import CheckpointError
from moe_serve.base.generation_config import UNUSED, USED
from moe_serve.base.model_config import ModelConfig, load_model_config
from moe_serve.launch.resolve import resolve
from tests.base.test_model_config import MIXTRAL

# What changes no answer: how transformers computes, what it returns beside the tokens, what other options switch on.
WITHOUT_EFFECT = {
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp"),
    *("early_stopping", "length_penalty"),  # of beams
    *("encoder_no_repeat_ngram_size", "decoder_start_token_id"),  # of encoders
    *("remove_invalid_values", "renormalize_logits", "pad_token_id", "transformers_version"),
    *("continuous_batching_config", "low_memory", "prefill_chunk_size", "generation_kwargs"),
}


def load(folder: Path, generation: object) -> ModelConfig:
    folder.joinpath("config.json").write_text(json.dumps(MIXTRAL))
    folder.joinpath("generation_config.json").write_text(json.dumps(generation))
    return load_model_config(folder)


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"top_p": 0.0}, "top_p must be greater than 0 and at most 1, not 0.0"),
    ({"top_p": 1.5}, "top_p must be greater than 0"),
    ({"temperature": -1}, "temperature must be at least 0"),
    ({"temperature": float("nan")}, "temperature must be at least 0"),
    ({"temperature": float("inf")}, "temperature must be at least 0"),
    ({"temperature": "hot"}, "temperature must be a number"),
    ({"temperature": True}, "temperature must be a number"),
    ({"temperature": [0.7]}, "temperature must be a number"),
    ({"repetition_penalty": 0}, "repetition_penalty must be greater than 0"),
    ({"min_p": 2}, "min_p must be at least 0 and at most 1"),
    ({"top_k": -5}, "top_k must be at least -1"),
    ({"top_k": 50.0}, "top_k must be an integer"),
    ({"do_sample": "no"}, "do_sample must be true or false"),
    ({"do_sample": False, "temperature": -1}, "temperature must be at least 0"),
    ({"eos_token_id": "2"}, "eos_token_id must be a token id"),
]


@pytest.mark.parametrize(("generation", "words"), IMPOSSIBLE, ids=lambda value: str(value)[:50])
def test_a_value_that_no_request_can_satisfy_is_refused_with_its_file(
    generation: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, generation)
    assert words in str(caught.value)
    assert "generation_config.json" in str(caught.value)


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "min_p": 0.05, "do_sample": True},
        {"temperature": 1, "top_p": 1, "top_k": 0},
        {"temperature": None, "top_p": None, "top_k": -1},
        {"temperature": 0.0},
        {},
    ],
    ids=str,
)
def test_values_in_range_are_the_defaults_of_requests(generation: dict[str, Any], tmp_path: Path) -> None:
    config = load(tmp_path, generation)
    expected = {name: value for name, value in generation.items() if value is not None and name != "do_sample"}
    assert config.generation_defaults == expected
    assert config.notes == ()


def test_what_is_not_used_is_named_once_in_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(tmp_path, {"num_beams": 4, "suppress_tokens": [3], "max_new_tokens": 9, "typical_p": 1.0, "max_time": None})
    with caplog.at_level(logging.WARNING):
        resolve(Config.from_flat({"model": str(tmp_path)}))
    (said,) = caplog.messages
    for words in ("generation_config.json", "num_beams = 4", "suppress_tokens = [3]", "max_new_tokens = 9"):
        assert words in said
    assert "typical_p" not in said
    assert "max_time" not in said


def test_every_key_that_transformers_knows_is_used_named_or_without_effect() -> None:
    config: Any = GenerationConfig()
    known = {name for name in vars(config) if not name.startswith("_")}
    assert known - set(USED) - set(UNUSED) - WITHOUT_EFFECT == set()


@pytest.mark.parametrize("name", sorted(UNUSED))
def test_the_values_that_change_nothing_are_those_of_transformers(name: str) -> None:
    config: Any = GenerationConfig()
    generic = config._get_default_generation_params()
    assert generic.get(name) in UNUSED[name] or name == "max_length"
