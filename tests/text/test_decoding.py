"""Text token by token equals the tokenizer's decode of all tokens, for every kind of tokenizer and any chunking."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import decoders

from moe_serve.base.errors import CheckpointError
from moe_serve.text.detokenizer import IncrementalDetokenizer
from moe_serve.text.tokenizer import Tokenizer
from tests.support.tokenizer_folders import KINDS, TEXTS, TURN_END, write_folder

DECODED = [kind for kind in KINDS if kind not in ("neox", "qwen")]  # these decode as byte_level
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Tokenizer]:
    return {kind: Tokenizer(write_folder(tmp_path_factory.mktemp(kind), kind)) for kind in DECODED}


def chunks_of(ids: list[int], sizes: list[int]) -> list[list[int]]:
    chunks, start = [], 0
    for size in sizes:
        chunks.append(ids[start : start + size])
        start += size
    return [*chunks, ids[start:]]


@pytest.mark.parametrize("kind", DECODED)
@QUICK
@given(data=st.data())
def test_any_tokens_in_any_chunks_give_the_decode_of_all(
    tokenizers: Mapping[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    skip = data.draw(st.booleans())
    text = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [text.push(chunk) for chunk in chunks_of(ids, data.draw(st.lists(st.integers(0, 4), max_size=8)))]
    assert "".join(pieces) + text.finish() == tokenizer.decode(ids, skip_special_tokens=skip)
    assert text.num_tokens == len(ids)


@pytest.mark.parametrize("kind", ["byte_level", "sentence_pieces"])
@QUICK
@given(text=st.text(max_size=40))
def test_a_text_survives_encoding_and_streaming(tokenizers: Mapping[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = tokenizer.decoding.stream(True)
    special = kind == "sentence_pieces" and ("▁" in text or "<" in text)  # written as a blank or a special token
    if not special:
        assert "".join(map(stream.push, ids)) + stream.finish() == text


@pytest.mark.parametrize("kind", DECODED)
def test_no_piece_of_a_stream_is_ever_taken_back(tokenizers: Mapping[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        stream = tokenizer.decoding.stream(True)
        whole = tokenizer.decode(ids)
        told = ""
        for token_id in ids:
            told += stream.push(token_id)
            assert whole.startswith(told)
        assert told + stream.finish() == whole


@pytest.mark.parametrize("kind", ["byte_level", "sentence_pieces"])
def test_an_incomplete_last_character_is_flushed_as_a_replacement(
    tokenizers: Mapping[str, Tokenizer], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("ab\U00010348", add_special_tokens=False)  # four bytes that no merge joins
    text = IncrementalDetokenizer(tokenizer)
    assert text.push(ids[:-1]) == "ab"
    assert "\ufffd" in (rest := text.finish())
    assert "ab" + rest == tokenizer.decode(ids[:-1])


def test_special_tokens_are_shown_or_hidden_as_asked(tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode(f"one{TURN_END}two<odd token>")
    hidden, shown = IncrementalDetokenizer(tokenizer), IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    assert hidden.push(ids) == "onetwo<odd token>"
    assert shown.push(ids) == f"one{TURN_END}two<odd token>"


def test_offsets_say_where_each_token_begins_in_the_text(tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("one 🙃 two")
    text = IncrementalDetokenizer(tokenizer)
    whole = text.push(ids) + text.finish()
    assert whole == "one 🙃 two"
    for place, token_id in enumerate(ids):
        if not tokenizer.token_text(token_id).startswith("bytes:"):
            assert whole[text.offsets[place] :].startswith(tokenizer.token_text(token_id))


def test_tokens_have_names_of_their_own_in_log_probabilities(tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    names = [tokenizer.token_text(token_id) for token_id in range(tokenizer.vocab_size + 2)]
    assert len(set(names)) == len(names)
    assert names[-1] == f"token_id:{tokenizer.vocab_size + 1}"
    assert any(name.startswith("bytes:\\x") for name in names)


def test_bytes_of_a_texts_tokens_are_the_texts_bytes(tokenizers: Mapping[str, Tokenizer]) -> None:
    for kind in ("byte_level", "sentence_pieces"):
        tokenizer = tokenizers[kind]
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert b"".join(map(tokenizer.token_bytes, ids)).decode().lstrip() == text


def test_a_decoder_that_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    core = Core.from_file(str(tmp_path / "tokenizer.json"))
    core.decoder = decoders.CTC()
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="CTC is not supported"):
        Tokenizer(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["decoder"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert Tokenizer(tmp_path).vocab_size > 0
