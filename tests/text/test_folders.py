"""A table of made-up tokenizer folders, each read as transformers reads it: ids, texts, special tokens, prompts."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import models
from transformers import AutoTokenizer

from moe_serve.base.errors import CheckpointError, RequestError
from moe_serve.text.cleaning import clean
from moe_serve.text.detokenizer import IncrementalDetokenizer
from moe_serve.text.tokenizer import Tokenizer
from tests.support.tokenizer_folders import END, TURN_END, TURN_START, write_folder

HELLO = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
THINK = {"content": "<think>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
PLAIN, SPECIAL = THINK | {"special": False}, THINK | {"special": True}
ALL_ADDED = {
    str(place): (SPECIAL if place < 3 else PLAIN) | {"content": text}
    for place, text in {0: END, 1: TURN_START, 2: TURN_END, 400: "<odd token>", 401: "<think>"}.items()
}
TAGGED = {"__type": "AddedToken", "content": "<bos>", "lstrip": False, "normalized": False, "rstrip": False}
PADDING = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<fill>"}
SHOW = "{{ messages[0].content }}"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SHOW_NAMES = "|".join(f"{{{{ {name} }}}}" for name in (*NAMES, "image_token", "think_token"))
TEXTS = (
    "In the beginning was the word, and the word isn't it ' s over . What ? No !",
    " two  blanks ",
    "Größe 北京 🙃",
    f"one{TURN_END}two {TURN_START} three{END}<odd token>",
    "<think>x</think> a <think> b <mine><bos><s></s>[SEP]<fill><|pad|><image>",
    "",
)


@dataclass(frozen=True)
class Case:
    """A folder. `config` goes over tokenizer_config.json's usual values, `core` over tokenizer.json's; None drops."""

    name: str
    kind: str = "byte_level"
    config: Mapping[str, object] = field(default_factory=dict)
    core: Mapping[str, object] = field(default_factory=dict)
    files: Mapping[str, object] = field(default_factory=dict)
    without: tuple[str, ...] = ()


CASES = [
    Case("as usual"),
    *(Case(f"as usual, {kind}", kind) for kind in ("sentence_pieces", "unigram", "word_pieces", "plain_words")),
    Case("no tokenizer_config.json", without=("tokenizer_config.json",)),
    Case("added_tokens_decoder adds", config={"added_tokens_decoder": {"400": PLAIN}}),
    Case("added_tokens_decoder adds a special one", config={"added_tokens_decoder": {"400": SPECIAL}}),
    Case("added_tokens_decoder with other ids", config={"added_tokens_decoder": {"999": PLAIN}}),
    Case("added_tokens_decoder out of order", config={"added_tokens_decoder": {"402": PLAIN, "7": TAGGED}}),
    Case("added_tokens_decoder, normalized", config={"added_tokens_decoder": {"400": PLAIN | {"normalized": True}}}),
    Case("added_tokens_decoder eats blanks", config={"added_tokens_decoder": {"400": PLAIN | {"lstrip": True}}}),
    Case("added_tokens_decoder, whole words", config={"added_tokens_decoder": {"400": PLAIN | {"single_word": True}}}),
    Case("added_tokens_decoder of a known token", config={"added_tokens_decoder": {"5": PLAIN | {"content": "the"}}}),
    Case("added_tokens_decoder empty", config={"added_tokens_decoder": {}}, files={"added_tokens.json": {"<mine>": 9}}),
    Case("added_tokens_decoder, pieces", "sentence_pieces", config={"added_tokens_decoder": {"9": SPECIAL}}),
    Case(
        "added_tokens_decoder makes a plain token special",
        config={"added_tokens_decoder": {"402": SPECIAL | {"content": "<odd token>"}}},
    ),
    Case("added_tokens_decoder of an end token", config={"eos_token": "<think>", "added_tokens_decoder": {"9": PLAIN}}),
    Case("added_tokens.json adds", files={"added_tokens.json": {"<think>": 401, "</think>": 402}}),
    Case("added_tokens.json with the id of another", files={"added_tokens.json": {"<think>": 400, "</think>": 401}}),
    Case("added_tokens.json with other ids", files={"added_tokens.json": {"<think>": 500, "</think>": 450}}),
    Case(
        "added_tokens.json with a special token",
        config={"eos_token": "<mine>"},
        files={"added_tokens.json": {"<mine>": 400}},
    ),
    Case("added_tokens.json, pieces", "sentence_pieces", files={"added_tokens.json": {"<think>": 9}}),
    Case(
        "added_tokens.json beside added_tokens_decoder",
        config={"added_tokens_decoder": {"400": PLAIN}},
        files={"added_tokens.json": {"<mine>": 400}},
    ),
    Case("special_tokens_map.json names", files={"special_tokens_map.json": {"bos_token": "<bos>", "eos_token": END}}),
    Case(
        "special_tokens_map.json with an object",
        files={"special_tokens_map.json": {"bos_token": {"content": "<bos>", "lstrip": True, "special": False}}},
    ),
    Case(
        "special_tokens_map.json beside added_tokens_decoder",
        config={"added_tokens_decoder": {}},
        files={"special_tokens_map.json": {"bos_token": "<bos>"}},
    ),
    Case(
        "special_tokens_map.json lists more",
        files={"special_tokens_map.json": {"additional_special_tokens": ["<mine>", TURN_START]}},
    ),
    Case(
        "special_tokens_map.json lists more beside config",
        config={"additional_special_tokens": ["<think>"]},
        files={"special_tokens_map.json": {"additional_special_tokens": ["<mine>"]}},
    ),
    Case(
        "special_tokens_map.json lists extra",
        config={"extra_special_tokens": ["<think>"]},
        files={"special_tokens_map.json": {"extra_special_tokens": ["<mine>"]}},
    ),
    Case("special_tokens_map.json names of its own", files={"special_tokens_map.json": {"image_token": "<image>"}}),
    Case(
        "special_tokens_map.json has extra names",
        files={"special_tokens_map.json": {"extra_special_tokens": {"image_token": "<image>"}}},
    ),
    Case(
        "special tokens the vocabulary lacks",
        config={"bos_token": "<bos>", "pad_token": "<|pad|>", "cls_token": "<think>"},
    ),
    Case("special tokens as objects", config={"bos_token": TAGGED}),
    Case("an end token that is a plain added token", config={"eos_token": "<odd token>"}),
    Case("special tokens that are null", config={"bos_token": None, "eos_token": None, "pad_token": None}),
    Case("additional_special_tokens", config={"additional_special_tokens": ["<think>", "<odd token>"]}),
    Case("additional_special_tokens as objects", config={"additional_special_tokens": [TAGGED]}),
    Case("extra_special_tokens", config={"extra_special_tokens": ["<mine>"], "additional_special_tokens": ["<think>"]}),
    Case("extra_special_tokens empty", config={"extra_special_tokens": [], "additional_special_tokens": ["<think>"]}),
    Case("extra_special_tokens with names", config={"extra_special_tokens": {"image_token": "<image>"}}),
    Case("model_specific_special_tokens", config={"model_specific_special_tokens": {"image_token": "<image>"}}),
    Case(
        "tokens with names of their own",
        config={"image_token": "<image>", "think_token": TAGGED, "add_bos_token": True},
    ),
    Case("a pad token of tokenizer.json's padding", config={"pad_token": ...}, core={"padding": PADDING}),
    Case("a pad token of its own beside padding", core={"padding": PADDING}),
    Case(
        "truncation",
        core={"truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}},
    ),
    Case("add_bos_token", config={"bos_token": END, "add_bos_token": True, "add_eos_token": True}),
    Case("add_bos_token false, pieces", "sentence_pieces", config={"bos_token": "<s>", "add_bos_token": False}),
    Case(
        "a BOS of the post-processor",
        "sentence_pieces",
        config={"bos_token": "<s>", "eos_token": "</s>", "legacy": True},
    ),
    Case("split_special_tokens", config={"split_special_tokens": True}),
    Case("split_special_tokens, pieces", "sentence_pieces", config={"split_special_tokens": True}),
    Case("clean_up of byte-level BPE is not done", config={"clean_up_tokenization_spaces": True}),
    Case("clean_up of pieces of BPE is not done", "sentence_pieces", config={"clean_up_tokenization_spaces": True}),
    Case(
        "clean_up forced",
        config={
            "clean_up_tokenization_spaces": True,
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
        },
    ),
    Case("clean_up, unigram", "unigram", config={"clean_up_tokenization_spaces": True}),
    Case("clean_up, words", "plain_words", config={"clean_up_tokenization_spaces": True}),
    Case("clean_up, word pieces", "word_pieces", config={"clean_up_tokenization_spaces": True}),
    Case("clean_up false, unigram", "unigram", config={"clean_up_tokenization_spaces": False}),
    Case(
        "what changes nothing",
        config={
            "model_max_length": 3,
            "padding_side": "left",
            "truncation_side": "left",
            "add_prefix_space": True,
            "use_default_system_prompt": True,
            "errors": "strict",
            "model_input_names": ["input_ids"],
        },
    ),
    Case(
        "fast_tokenizer_files",
        config={"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.0.json", "tokenizer.99.0.json"]},
        files={"tokenizer.4.0.0.json": "unigram", "tokenizer.99.0.json": "plain_words"},
    ),
    Case(
        "class of Qwen, nothing named",
        "byte_level",
        config={"tokenizer_class": "Qwen2Tokenizer", "eos_token": ..., "pad_token": ...},
    ),
    Case(
        "a model type, nothing named",
        config={"tokenizer_class": ..., "eos_token": ..., "pad_token": ...},
        files={"config.json": {"model_type": "qwen3_moe"}},
    ),
    Case(
        "class of OLMoE",
        "neox",
        config={"tokenizer_class": "GPTNeoXTokenizer", "eos_token": ...},
        files={"config.json": {"model_type": "olmoe"}},
    ),
    Case(
        "class of Llama for Mixtral",
        "sentence_pieces",
        config={"tokenizer_class": "LlamaTokenizer"},
        files={"config.json": {"model_type": "mixtral"}},
    ),
    Case(
        "class of Qwen with added tokens",
        "qwen",
        config={"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": ALL_ADDED},
    ),
    Case("template of the config", config={"chat_template": "config " + SHOW}),
    Case("template file", config={"chat_template": "config"}, files={"chat_template.jinja": "file " + SHOW}),
    Case(
        "named templates in a list",
        config={"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]},
    ),
    Case("named templates in an object", config={"chat_template": {"default": "d", "tool_use": "t"}}),
    Case(
        "a template for tools beside the config's",
        config={"chat_template": "config"},
        files={"additional_chat_templates/tool_use.jinja": "t"},
    ),
    Case(
        "a template for tools beside the file",
        files={"chat_template.jinja": "d", "additional_chat_templates/tool_use.jinja": "t"},
    ),
    Case(
        "files against named templates",
        config={"chat_template": [{"name": "tool_use", "template": "t"}]},
        files={"chat_template.jinja": "d"},
    ),
    Case(
        "named files only",
        files={"additional_chat_templates/rag.jinja": "r", "additional_chat_templates/default.jinja": "d"},
    ),
    Case("a processor's template", config={"chat_template": ...}, files={"chat_template.json": {"chat_template": "p"}}),
    Case(
        "all names in a template", config={"bos_token": "<bos>", "image_token": "<image>", "chat_template": SHOW_NAMES}
    ),
]


def write(folder: Path, case: Case) -> Path:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **case.config}
    write_folder(folder, case.kind, config={name: value for name, value in config.items() if value is not ...})
    values = json.loads((folder / "tokenizer_config.json").read_text())
    dropped = [name for name, value in case.config.items() if value is ...]
    (folder / "tokenizer_config.json").write_text(json.dumps({n: v for n, v in values.items() if n not in dropped}))
    core = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(core | dict(case.core)))
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name.startswith("tokenizer."):
            write_folder(folder / "other", str(content))
            content = (folder / "other" / "tokenizer.json").read_text()
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    for name in case.without:
        (folder / name).unlink()
    return folder


def rendered(render: Any, tools: Any) -> str | None:
    try:
        return str(render(tools))
    except (RequestError, ValueError):
        return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_folder_is_read_as_transformers_reads_it(case: Case, tmp_path: Path) -> None:
    write(tmp_path, case)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path)  # type: ignore[no-untyped-call]
    ours = Tokenizer(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special) == ids, text
            for skip in (True, False):
                whole = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == whole
                stream = IncrementalDetokenizer(ours, skip_special_tokens=skip)
                assert "".join(stream.push([token_id]) for token_id in ids) + stream.finish() == whole
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    for tools in (None, TOOLS):
        expected = rendered(
            lambda tools: theirs.apply_chat_template(HELLO, tools=tools, tokenize=False, add_generation_prompt=True),
            tools,
        )
        assert rendered(lambda tools: ours.render_chat(HELLO, tools=tools), tools) == expected


def test_the_table_sees_what_it_should(tmp_path: Path) -> None:
    """Without what a file adds, the comparison would find a difference."""
    with_file = Tokenizer(write(tmp_path / "a", Case("", files={"added_tokens.json": {"<think>": 401}})))
    without = Tokenizer(write(tmp_path / "b", Case("")))
    assert any(with_file.encode(text) != without.encode(text) for text in TEXTS)


WRONG = [
    ({"added_tokens_decoder": ["<think>"]}, {}, "tokenizer_config.json: added_tokens_decoder must be an object"),
    ({"added_tokens_decoder": {"x": PLAIN}}, {}, "added_tokens_decoder must be an object from token ids"),
    ({"added_tokens_decoder": {"400": "<think>"}}, {}, "added_tokens_decoder must be a token's text or an object"),
    ({"eos_token": 5}, {}, "eos_token must be a token's text"),
    ({"extra_special_tokens": "<think>"}, {}, "extra_special_tokens must be a list"),
    ({"additional_special_tokens": [5]}, {}, "extra_special_tokens must be a token's text"),
    ({"fast_tokenizer_files": ["../tokenizer.1.json"]}, {}, "fast_tokenizer_files must be a list of names"),
    ({}, {"added_tokens.json": {"<think>": "400"}}, "added_tokens.json: the id of token '<think>' must be an integer"),
    ({}, {"added_tokens.json": "["}, "added_tokens.json cannot be read as JSON"),
    ({}, {"special_tokens_map.json": "[]"}, "special_tokens_map.json must hold a JSON object"),
]


@pytest.mark.parametrize(("config", "files", "words"), WRONG, ids=lambda value: str(value)[:50])
def test_what_cannot_be_is_named_with_its_file(
    config: dict[str, object], files: dict[str, object], words: str, tmp_path: Path
) -> None:
    write(tmp_path, Case("", config=config, files=files))
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(tmp_path)
    assert words in str(caught.value)


def test_tokens_that_get_other_ids_than_the_folder_says_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        Tokenizer(write(tmp_path, Case("", config={"added_tokens_decoder": {"999": PLAIN}})))
    assert "<think> (999)" in caplog.text


def test_a_pipeline_that_transformers_would_build_anew_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        Tokenizer(write(tmp_path / "same", Case("", "qwen", config={"tokenizer_class": "Qwen2TokenizerFast"})))
        assert not caplog.text
        Tokenizer(write(tmp_path / "other", Case("", config={"tokenizer_class": "Qwen2Tokenizer"})))
    assert "has its own normalizer and pre_tokenizer, which is used" in caplog.text


def test_a_processors_template_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = Case("", config={"chat_template": ...}, files={"chat_template.json": {"chat_template": "p"}})
    with caplog.at_level(logging.WARNING):
        Tokenizer(write(tmp_path, case))
    assert "chat_template.json is not read" in caplog.text


LETTERS = " .?!,'ntmsverax"


@pytest.fixture(scope="module")
def cleaning(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Every token is one of LETTERS, and decoding cleans up."""
    folder = tmp_path_factory.mktemp("letters")
    write_folder(folder, "plain_words", config={"clean_up_tokenization_spaces": True})
    model = models.WordLevel({letter: place for place, letter in enumerate(LETTERS)}, unk_token=" ")
    values = json.loads(Core(model).to_str()) | {"decoder": {"type": "Fuse"}}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return Tokenizer(folder)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=LETTERS, max_size=30))
def test_a_text_cleaned_as_it_grows_is_the_whole_text_cleaned(cleaning: Tokenizer, text: str) -> None:
    ids = [LETTERS.index(letter) for letter in text]
    stream = cleaning.stream(True)
    assert "".join(map(stream.push, ids)) + stream.finish() == clean(text) == cleaning.decode(ids)
