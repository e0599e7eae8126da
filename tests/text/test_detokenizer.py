"""Stop strings: found across tokens and chunks, text held back only as long as it could begin one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_serve.text.detokenizer import IncrementalDetokenizer
from moe_serve.text.stops import StopMatcher
from moe_serve.text.tokenizer import Tokenizer
from tests.support.tokenizer_folders import TURN_END, write_folder

SHORT_TEXT = st.text(alphabet="ab", max_size=30)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path_factory.mktemp("tokenizer")))


def characters(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per byte."""
    return [token for character in text for token in tokenizer.encode(character)]


def cut_by_hand(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first (the longest of those), and that string."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(text=SHORT_TEXT, stops=STOPS, sizes=st.lists(st.integers(0, 5), max_size=10))
def test_the_matcher_finds_what_a_search_by_hand_finds(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher = StopMatcher(stops)
    start, found = 0, None
    for size in [*sizes, len(text)]:
        found = matcher.feed(text[start : start + size])
        if found is not None:
            break
        start += size
        seen = text[:start]
        begun = [n for stop in stops for n in range(len(stop)) if n <= len(seen) and seen.endswith(stop[:n])]
        assert matcher.partial == max(begun)
    before, stop = cut_by_hand(text, stops)
    if found is None:
        assert stop is None
    else:
        assert (text[: start + found[0]], found[1]) == (before + (stop or ""), stop)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=SHORT_TEXT, stops=STOPS, size=st.integers(1, 5), include=st.booleans())
def test_streamed_text_ends_at_the_first_stop_string(
    tokenizer: Tokenizer, text: str, stops: list[str], size: int, include: bool
) -> None:
    ids = characters(tokenizer, text)
    stream = IncrementalDetokenizer(tokenizer, stop=stops, include_stop=include)
    told = "".join(stream.push(ids[start : start + size]) for start in range(0, len(ids), size)) + stream.finish()
    before, stop = cut_by_hand(text, stops)
    assert told == before + (stop or "" if include else "")
    assert stream.stopped_by == stop
    if stop is not None:
        assert stream.num_tokens == len(characters(tokenizer, before + stop)), "tokens after the stop are not taken"


def test_only_what_could_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    stream = IncrementalDetokenizer(tokenizer, stop=["END"])
    assert stream.push(characters(tokenizer, "theE")) == "the"
    assert stream.push(characters(tokenizer, "N")) == ""
    assert stream.push(characters(tokenizer, "T")) == "ENT"
    assert stream.push(characters(tokenizer, "EN")) == ""
    assert stream.finish() == "EN"
    assert stream.stopped_by is None


def test_a_stop_string_inside_one_token_cuts_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" beginning")
    stream = IncrementalDetokenizer(tokenizer, stop=["ginn"])
    assert stream.push(ids) + stream.finish() == " be"


def test_a_stop_string_of_characters_that_arrive_in_bytes(tokenizer: Tokenizer) -> None:
    ids = characters(tokenizer, "a🙂🙃b")
    assert len(ids) > 4
    stream = IncrementalDetokenizer(tokenizer, stop=["🙃"])
    assert "".join(stream.push([token_id]) for token_id in ids) == "a🙂"
    assert stream.stopped_by == "🙃"


def test_hidden_special_tokens_do_not_separate_a_stop_string(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("on"), *tokenizer.encode(TURN_END), *tokenizer.encode("e two")]
    stream = IncrementalDetokenizer(tokenizer, stop=["one"])
    assert stream.push(ids) + stream.finish() == ""
    shown = IncrementalDetokenizer(tokenizer, stop=["one"], skip_special_tokens=False)
    assert shown.push(ids) + shown.finish() == f"on{TURN_END}e two"


def test_stop_strings_in_the_first_min_tokens_do_not_count(tokenizer: Tokenizer) -> None:
    stream = IncrementalDetokenizer(tokenizer, stop=["a"], min_tokens=3)
    assert stream.push(characters(tokenizer, "aaab")) == "aaab"[:3] + "b"
    assert stream.stopped_by is None
    assert stream.push(characters(tokenizer, "cad")) == "c"
    assert stream.stopped_by == "a"


def test_a_stop_string_that_the_flushed_last_character_completes(tokenizer: Tokenizer) -> None:
    ids = characters(tokenizer, "x🙃")[:-1]
    stream = IncrementalDetokenizer(tokenizer, stop=["x\ufffd"])
    assert stream.push(ids) + stream.finish() == ""
    assert stream.stopped_by == "x\ufffd"


def test_nothing_comes_after_the_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    stream = IncrementalDetokenizer(tokenizer, stop=["b"])
    assert stream.push(characters(tokenizer, "abc")) == "a"
    assert stream.push(characters(tokenizer, "def")) == ""
    assert stream.finish() == ""
