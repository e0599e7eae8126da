"""An answer grows by events, and says how it ended."""

from __future__ import annotations

import pytest

from moe_serve.base.commands import TokenLogprob
from moe_serve.base.engine_messages import FinishReason, TokenEvent
from moe_serve.base.sampling import SamplingParams
from moe_serve.text.growing import GrowingText
from moe_serve.text.tokenizer import Tokenizer
from tests.support.tokenizer_folders import write_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("tokenizer")))


def characters(tokenizer: Tokenizer, text: str) -> list[int]:
    return [token for character in text for token in tokenizer.encode(character)]


def event(ids: list[int], finish: FinishReason | None = None, stop_token: int | None = None) -> TokenEvent:
    entries = [TokenLogprob(token, -1.0, 1, []) for token in ids]
    return TokenEvent(request_id="r", token_ids=ids, finish_reason=finish, stop_token=stop_token, logprobs=entries)


def test_tokens_and_logprobs_after_a_stop_string_are_not_taken(tokenizer: Tokenizer) -> None:
    growing = GrowingText(tokenizer, [], SamplingParams(stop=("bc",), logprobs=0))
    ids = characters(tokenizer, "abcde")
    first, second = growing.take(event(ids[:2])), growing.take(event(ids[2:]))
    assert (first.text + second.text, first.token_ids, second.token_ids) == ("a", ids[:2], ids[2:3])
    assert first.logprobs is not None
    assert second.logprobs is not None
    assert [entry.token_id for entry in first.logprobs + second.logprobs] == ids[:3]
    assert (growing.finish_reason, growing.stop_reason) == ("stop", "bc")


def test_an_answer_that_grows_has_no_reason_and_an_end_token_is_its_stop_reason(tokenizer: Tokenizer) -> None:
    growing = GrowingText(tokenizer, [], SamplingParams())
    ids = characters(tokenizer, "ab")
    assert growing.take(event(ids[:1])).logprobs is None
    assert (growing.finish_reason, growing.stop_reason) == (None, None)
    growing.take(event(ids[1:], "stop", stop_token=ids[1]))
    assert (growing.finish_reason, growing.stop_reason) == ("stop", ids[1])


def test_what_was_held_back_for_a_stop_string_comes_with_the_last_event(tokenizer: Tokenizer) -> None:
    growing = GrowingText(tokenizer, [], SamplingParams(stop=("bcd",)))
    ids = characters(tokenizer, "abc")
    assert growing.take(event(ids[:2])).text == "a"
    last = growing.take(event(ids[2:], "length"))
    assert (last.text, last.offsets) == ("bc", [2])
    assert (growing.finish_reason, growing.stop_reason) == ("length", None)
