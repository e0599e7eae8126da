"""An answer's text is what its tokens add to the text of its prompt; stop strings may hold special tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_serve.base.engine_messages import TokenEvent
from moe_serve.base.sampling import SamplingParams
from moe_serve.text.detokenizer import IncrementalDetokenizer
from moe_serve.text.growing import GrowingText
from moe_serve.text.tokenizer import Tokenizer
from tests.support.tokenizer_folders import KINDS, TEXTS, TURN_END, write_folder

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PIPELINES = ("neox", "qwen")  # byte_level's decoder once more
DECODED = [kind for kind in KINDS if kind not in PIPELINES]
SPECIAL = {"byte_level": TURN_END, "sentence_pieces": "</s>", "word_pieces": "[SEP]"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Tokenizer]:
    return {kind: Tokenizer(write_folder(tmp_path_factory.mktemp(kind), kind)) for kind in DECODED}


def answer(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    ids: Sequence[int],
    *,
    stop: tuple[str, ...] = (),
    skip: bool = True,
    include: bool = False,
) -> tuple[str, str | None]:
    """The text told token by token, and the stop string that ended it."""
    text = IncrementalDetokenizer(tokenizer, after=prompt, skip_special_tokens=skip, stop=stop, include_stop=include)
    return "".join(text.push([token_id]) for token_id in ids) + text.finish(), text.stopped_by


@pytest.mark.parametrize("kind", DECODED)
@QUICK
@given(data=st.data())
def test_prompt_and_answer_together_are_decoded_as_one(
    tokenizers: Mapping[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers[kind]
    some_ids = st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=12)
    prompt, ids, skip = data.draw(some_ids), data.draw(some_ids), data.draw(st.booleans())
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)
    # Else the answer would change what its prompt reads, or goes on with a broken character of it.
    if whole.startswith(before) and not before.endswith("\ufffd"):
        assert answer(tokenizer, prompt, ids, skip=skip)[0] == whole[len(before) :]


@pytest.mark.parametrize("kind", ["byte_level", "sentence_pieces"])
@QUICK
@given(text=st.text(min_size=1, max_size=4), cut=st.integers(0, 12))
def test_a_character_begun_in_the_prompt_is_the_answers(
    tokenizers: Mapping[str, Tokenizer], kind: str, text: str, cut: int
) -> None:
    tokenizer = tokenizers[kind]
    ids = {tokenizer.token_bytes(token_id): token_id for token_id in reversed(range(3, tokenizer.vocab_size))}
    tokens = [ids[bytes([byte])] for byte in text.encode()]
    complete = text.encode()[:cut].decode(errors="ignore")
    told = answer(tokenizer, [*tokenizer.encode("word"), *tokens[:cut]], tokens[cut:])[0]
    assert told == (text[len(complete) :] if tokens[cut:] else "")


@pytest.mark.parametrize("kind", DECODED)
def test_a_text_cut_anywhere_goes_on_as_it_was(tokenizers: Mapping[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    for text in TEXTS[:2]:
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        for cut in range(len(ids)):
            assert tokenizer.decode(ids[:cut]) + answer(tokenizer, ids[:cut], ids[cut:])[0] == whole


def test_the_space_between_prompt_and_answer_is_told(tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentence_pieces"]
    prompt, ids = tokenizer.encode("the word"), tokenizer.encode("with the", add_special_tokens=False)
    growing = GrowingText(tokenizer, prompt, SamplingParams())
    event = TokenEvent(request_id="r", token_ids=ids, finish_reason="length")
    assert growing.take(event).text == " with the"
    assert answer(tokenizer, [], ids)[0] == "with the"
    assert answer(tokenizer, [1], ids)[0] == "with the"
    assert answer(tokenizer, [1], ids, skip=False)[0] == " with the"


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("include", [False, True])
def test_a_special_tokens_text_stops_an_answer(tokenizers: Mapping[str, Tokenizer], kind: str, include: bool) -> None:
    tokenizer, special = tokenizers[kind], SPECIAL[kind]
    prompt, ids = tokenizer.encode("In the"), tokenizer.encode("beginning was", add_special_tokens=False)
    rest = tokenizer.encode("the word", add_special_tokens=False)
    plain = answer(tokenizer, prompt, ids)[0]
    end = tokenizer._core.token_to_id(special)
    for skip in (True, False):
        text, stop = answer(tokenizer, prompt, [*ids, end, *rest], stop=("never", special), skip=skip, include=include)
        assert stop == special
        # Word pieces have a blank before a special token where it is shown.
        assert text.replace(" " + special, special).rstrip() == plain + (special if include else "")


def test_the_answer_ends_with_stop_at_the_token(tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode(f"one two{TURN_END}three")
    growing = GrowingText(tokenizer, [], SamplingParams(stop=(TURN_END,)))
    growth = growing.take(TokenEvent(request_id="r", token_ids=ids, finish_reason="length"))
    assert (growth.text, growing.finish_reason, growing.stop_reason) == ("one two", "stop", TURN_END)
    assert growth.token_ids == tokenizer.encode(f"one two{TURN_END}")


def test_bytes_that_wait_come_before_a_special_token_that_stops(tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentence_pieces"]
    ids = tokenizer.encode("ab\U00010348", add_special_tokens=False)
    assert answer(tokenizer, [], [*ids, 2, *ids], stop=("</s>",)) == ("ab\U00010348", "</s>")
    assert answer(tokenizer, [], [*ids[:-1], 2], stop=("</s>",)) == ("ab\ufffd\ufffd\ufffd", "</s>")
    assert answer(tokenizer, [], [*ids, 2], stop=("b\U00010348</s>",)) == ("a", "b\U00010348</s>")
    assert answer(tokenizer, [], [*ids, 2], stop=("</s>", "\U00010348")) == ("ab", "\U00010348")


def test_stops_in_the_first_min_tokens_do_not_count_even_as_special_tokens(
    tokenizers: Mapping[str, Tokenizer],
) -> None:
    tokenizer = tokenizers["byte_level"]
    end = tokenizer.encode(TURN_END)
    ids = [*end, *tokenizer.encode("a"), *end, *tokenizer.encode("b")]
    text = IncrementalDetokenizer(tokenizer, stop=[TURN_END], min_tokens=2)
    assert (text.push(ids), text.stopped_by, text.num_tokens) == ("a", TURN_END, 3)


def by_hand(symbols: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """`S` is a hidden special token; each symbol is a token. Text and stop string of the answer, in symbols."""
    for length in range(1, len(symbols) + 1):
        shown = symbols[:length]
        visible = shown.replace("S", "")
        found = [
            stop
            for stop in stops
            if (shown.endswith(stop) if "S" in stop else shown[-1] != "S" and visible.endswith(stop))
        ]
        if found:
            stop = max(found, key=lambda each: len(each.replace("S", TURN_END)))
            kept = visible[: len(visible) - len(stop.replace("S", ""))]
            return kept + (stop if include else ""), stop
    return symbols.replace("S", ""), None


@settings(QUICK, max_examples=300)
@given(
    symbols=st.text(alphabet="abS", max_size=20),
    stops=st.lists(st.text(alphabet="abS", min_size=1, max_size=4), min_size=1, max_size=3),
    size=st.integers(1, 4),
    include=st.booleans(),
)
def test_a_stop_string_is_found_across_special_tokens_however_it_arrives(
    tokenizers: Mapping[str, Tokenizer], symbols: str, stops: list[str], size: int, include: bool
) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = [tokenizer.encode(symbol.replace("S", TURN_END))[0] for symbol in symbols]
    wanted = [stop.replace("S", TURN_END) for stop in stops]
    stream = IncrementalDetokenizer(tokenizer, stop=wanted, include_stop=include)
    told = "".join(stream.push(ids[start : start + size]) for start in range(0, len(ids), size)) + stream.finish()
    text, stop = by_hand(symbols, stops, include)
    assert told == text.replace("S", TURN_END)
    assert stream.stopped_by == (None if stop is None else stop.replace("S", TURN_END))


def test_what_could_begin_a_stop_string_with_a_special_token_is_held_back(
    tokenizers: Mapping[str, Tokenizer], tmp_path: Path
) -> None:
    tokenizer = tokenizers["byte_level"]
    text = IncrementalDetokenizer(tokenizer, stop=[f"b{TURN_END}"])
    assert text.push(tokenizer.encode("a")) == "a"
    assert text.push(tokenizer.encode("b")) == ""
    assert text.push(tokenizer.encode("c")) == "bc"


def test_a_part_of_a_hidden_tokens_text_is_no_stop_string(tokenizers: Mapping[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode(f"one{TURN_END}two>three")
    assert answer(tokenizer, [], ids, stop=("|>", ">", "end")) == ("onetwo", ">")
    assert answer(tokenizer, [], ids, stop=("|>", ">", "end"), skip=False) == ("one<|im_", "end")
    assert tokenizer.special_stops(["xyz", "im_end", "<|im_end"], []) is None
