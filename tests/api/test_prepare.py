"""A text that cannot fit is refused before all of it is encoded, whatever the tokenizer; one that fits never is."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import tokenizers

from moe_serve.api import prepare
from moe_serve.api.schemas import CompletionBody
from moe_serve.base.errors import ContextTooLong
from moe_serve.text.chat_template import ChatPrompt
from moe_serve.text.tokenizer import Tokenizer
from tests.support.letters import write_letters

MAX_MODEL_LEN = 100


class Watched(Tokenizer):
    """Remembers how many characters it was given to encode."""

    num_characters = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.num_characters += len(text)
        return super().encode(text, add_special_tokens)


@pytest.fixture
def letters(tmp_path: Path) -> Watched:
    """Each letter is a token, but an unknown word may be as long as it likes: no bound is known."""
    write_letters(tmp_path, 131)
    tokenizer = Watched(tmp_path)
    assert tokenizer.least_tokens("x" * 1000) == 0
    return tokenizer


@pytest.fixture
def words(tmp_path: Path) -> Watched:
    """Each word is a token, whatever its length."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.decoder = tokenizers.decoders.Fuse()
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    return Watched(tmp_path)


def completion(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    return asyncio.run(prepare.completion_prompts(tokenizer, CompletionBody(prompt=text), MAX_MODEL_LEN))


def test_of_a_text_that_cannot_fit_only_the_beginning_is_encoded(letters: Watched) -> None:
    with pytest.raises(ContextTooLong, match=r"1000000 characters, .* --max-model-len"):
        completion(letters, "x" * 1_000_000)
    assert letters.num_characters < 10_000
    with pytest.raises(ContextTooLong):
        asyncio.run(prepare.chat_ids(letters, ChatPrompt("x" * 1_000_000), MAX_MODEL_LEN))
    assert letters.num_characters < 20_000


def test_a_text_whose_end_is_denser_than_its_beginning_is_refused_once_that_is_seen(words: Watched) -> None:
    with pytest.raises(ContextTooLong):
        completion(words, "x" * 20_000 + " x" * 1_000_000)
    assert words.num_characters < 200_000


def test_a_text_of_few_and_very_long_words_fits(words: Watched) -> None:
    text = " ".join(["x" * 50_000] * 90)
    assert completion(words, text) == [[0] * 90]
    assert words.num_characters < 1.4 * len(text)
