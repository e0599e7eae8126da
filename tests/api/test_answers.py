"""What answers say: exact texts of scripted engines, through HTTP, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from moe_serve.api.state import ApiState
from tests.api.conftest import Served
from tests.support.http_server import engines_of, make_state, serving
from tests.support.tokenizer_folders import END, TURN_END, TURN_START, write_folder

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def post(served: Served, path: str, body: object) -> httpx.Response:
    return httpx.post(served.url + path, json=body, headers=served.headers, timeout=30)


def says(served: Served, *token_ids: int, events_of: int = 1) -> None:
    served.engines.script = lambda prompt, sampling: token_ids
    served.engines.tokens_per_event = events_of


def both(served: Served, **options: object) -> tuple[str, str]:
    """The text of a completion and why it ended; streamed it must be the same."""
    body = {"prompt": "x", "max_tokens": 50, **options}
    choice = post(served, "/v1/completions", body).json()["choices"][0]
    lines = post(served, "/v1/completions", body | {"stream": True}).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]
    assert [e["choices"][0]["finish_reason"] for e in events][-1] == choice["finish_reason"]
    chat = post(served, "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 50, **options}).json()
    assert chat["choices"][0]["message"]["content"] == choice["text"]
    return choice["text"], choice["finish_reason"]


def ids(served: Served, text: str) -> list[int]:
    return served.state.tokenizer.encode(text)


# --- texts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("events_of", [1, 2, 50])
def test_an_answer_is_the_decode_of_all_its_tokens(served: Served, events_of: int) -> None:
    tokens = ids(served, f"naïve 🙃 {TURN_START}北京\u2028\x85\x00 end{TURN_END}")
    says(served, *tokens, events_of=events_of)
    expected = served.state.tokenizer.decode(tokens)
    assert both(served) == (expected, "stop")
    assert expected == "naïve 🙃 北京\u2028\x85\x00 end"
    shown = both(served, skip_special_tokens=False)
    assert shown == (f"naïve 🙃 {TURN_START}北京\u2028\x85\x00 end{TURN_END}", "stop")


def test_an_incomplete_last_character_becomes_a_replacement(served: Served) -> None:
    tokens = ids(served, "ab🙃")
    says(served, *tokens)
    limit = len(tokens) - 1
    text, reason = both(served, max_tokens=limit)
    assert (text, reason) == (served.state.tokenizer.decode(tokens[:limit]), "length")
    assert text.startswith("ab\ufffd")


def test_text_held_back_for_a_stop_string_comes_out_in_the_end(served: Served) -> None:
    says(served, *ids(served, f"wait for EN{TURN_END}"))
    assert both(served, stop=["END"]) == ("wait for EN", "stop")


def test_a_stop_string_over_several_tokens_and_events(served: Served) -> None:
    says(served, *ids(served, f"one two three four five six seven{TURN_END}"))
    assert both(served, stop=["ee fo", "nothing"]) == ("one two thr", "stop")
    kept = both(served, stop=["ee fo"], include_stop_str_in_output=True)
    assert kept == ("one two three fo", "stop")


def test_usage_counts_the_tokens_up_to_the_stop_string(served: Served) -> None:
    says(served, *(token for letter in "abcdefgh" for token in ids(served, letter)), events_of=8)
    used = post(served, "/v1/completions", {"prompt": "xy", "stop": "d", "max_tokens": 8}).json()["usage"]
    assert used["completion_tokens"] == 4


def test_an_answer_that_is_empty_is_still_an_answer(served: Served) -> None:
    says(served, *ids(served, TURN_END))
    assert both(served) == ("", "stop")


def test_logprobs_end_with_the_token_that_completed_the_stop_string(served: Served) -> None:
    says(served, *(token for letter in "abcdefgh" for token in ids(served, letter)), events_of=8)
    body = {"prompt": "x", "stop": "d", "logprobs": 0, "max_tokens": 8}
    choice = post(served, "/v1/completions", body).json()["choices"][0]
    assert choice["text"] == "abc"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "d"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


# --- echo ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["plain text", f"one{END} two{TURN_START}", "🙃🙂"])
def test_echoed_tokens_have_their_places_in_the_text(served: Served, prompt: str) -> None:
    says(served, *ids(served, "yes"))
    num_answer = len(ids(served, "yes"))
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": num_answer}
    choice = post(served, "/v1/completions", body).json()["choices"][0]
    assert choice["text"] == prompt + "yes"
    logprobs = choice["logprobs"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)


def test_an_echo_of_ids_shows_special_tokens_when_asked(served: Served) -> None:
    says(served, *ids(served, "yes"))
    prompt = ids(served, f"one{END}")
    body = {"prompt": prompt, "echo": True, "max_tokens": 1}
    assert post(served, "/v1/completions", body).json()["choices"][0]["text"].startswith("oney")
    shown = post(served, "/v1/completions", body | {"skip_special_tokens": False})
    assert shown.json()["choices"][0]["text"].startswith(f"one{END}y")


def test_an_echo_for_each_of_several_prompts_and_choices(served: Served) -> None:
    body = {"prompt": ["aa", "bb"], "n": 2, "echo": True, "max_tokens": 3}
    choices = post(served, "/v1/completions", body).json()["choices"]
    assert [choice["text"][:2] for choice in choices] == ["aa", "aa", "bb", "bb"]


# --- what reaches the engines ----------------------------------------------------------------------------------


def test_sampling_reaches_the_engines_as_asked(served: Served) -> None:
    options = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "min_tokens": 2,
        "max_tokens": 4,
        "ignore_eos": True,
        "stop_token_ids": [5],
        "logit_bias": {"3": -2},
    }
    assert post(served, "/v1/completions", {"prompt": "x", "seed": 2**63 - 1, "n": 2, **options}).status_code == 200
    first, second = (received.sampling for received in served.engines.received)
    for name, value in options.items():
        expected = {"stop_token_ids": (5,), "logit_bias": {3: -2.0}}.get(name, value)
        assert getattr(first, name) == getattr(second, name) == expected
    assert (first.seed, second.seed) == (2**63 - 1, -(2**63)), "seeds of choices go round"


def test_without_a_limit_a_chat_may_fill_the_context(served: Served) -> None:
    assert post(served, "/v1/chat/completions", {"messages": MESSAGES}).status_code == 200
    received = served.engines.received[0]
    assert received.sampling.max_tokens == served.engines.max_model_len - len(received.token_ids)


def test_null_means_not_given(served: Served) -> None:
    names = ("temperature", "n", "stop", "logit_bias", "seed", "max_tokens", "stream", "logprobs", "echo", "user")
    assert post(served, "/v1/completions", {"prompt": "x"} | dict.fromkeys(names)).status_code == 200
    assert served.engines.received[0].sampling.temperature == 1.0


def test_fields_without_a_meaning_here_are_accepted(served: Served) -> None:
    extra = {"user": "u", "store": False, "metadata": {"a": "b"}, "parallel_tool_calls": True, "tool_choice": "none"}
    assert post(served, "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1} | extra).status_code == 200


# --- other folders ---------------------------------------------------------------------------------------------


def test_the_text_of_a_special_token_is_a_stop_string_like_any_other(served: Served) -> None:
    says(served, *ids(served, f"one two{TURN_START}three{TURN_END}"))
    assert both(served, stop=["never", TURN_START]) == ("one two", "stop")
    assert both(served, stop=[TURN_START], include_stop_str_in_output=True) == (f"one two{TURN_START}", "stop")
    assert both(served, stop=[f"two{TURN_START}th"]) == ("one ", "stop")
    assert both(served, stop=[TURN_START], skip_special_tokens=False) == ("one two", "stop")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ApiState]]:
    """A model without chat template, with a BOS and with defaults of its own."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}
    folder = write_folder(tmp_path_factory.mktemp("bare"), "sentence_pieces", config=names, chat_template=None)
    state = make_state(folder, dp=1)
    state.generation_defaults = {"temperature": 0.25, "top_k": 9.0, "repetition_penalty": 1.1}
    with serving(state) as url:
        yield url, state


def test_an_answer_in_pieces_goes_on_where_its_prompt_ends(bare: tuple[str, ApiState]) -> None:
    url, state = bare
    tokens = state.tokenizer.encode("with the others", add_special_tokens=False)
    engines_of(state).script = lambda prompt, sampling: [*tokens, 2]
    for body in ({"echo": True}, {"echo": False}):
        answer = httpx.post(url + "/v1/completions", json={"prompt": "the word", "max_tokens": 50, **body}).json()
        assert answer["choices"][0]["text"] == ("the word" if body["echo"] else "") + " with the others"
    engines_of(state).calm()


def test_a_model_without_template_refuses_to_chat_and_completes(bare: tuple[str, ApiState], tmp_path: Path) -> None:
    url, _ = bare
    for path in ("/v1/chat/completions", "/tokenize"):
        refused = httpx.post(url + path, json={"messages": MESSAGES})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
        assert "chat template" in refused.json()["error"]["message"]
    assert httpx.post(url + "/v1/completions", json={"prompt": "x"}).status_code == 200


def test_the_checkpoints_defaults_count_where_the_client_says_nothing(bare: tuple[str, ApiState]) -> None:
    url, state = bare
    engines = engines_of(state)
    engines.calm()
    httpx.post(url + "/v1/completions", json={"prompt": "x", "top_k": 3})
    sampling = engines.received[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.repetition_penalty) == (0.25, 3, 1.1)


def test_a_bos_is_added_to_texts_unless_declined(bare: tuple[str, ApiState]) -> None:
    url, state = bare
    engines = engines_of(state)
    engines.calm()
    for body in ({"prompt": "x"}, {"prompt": "x", "add_special_tokens": False}):
        assert httpx.post(url + "/v1/completions", json=body).status_code == 200
    with_bos, without = (received.token_ids for received in engines.received)
    assert with_bos == [1, *without]
    answer = httpx.post(url + "/tokenize", json={"prompt": "x", "return_token_strs": True}).json()
    assert (answer["tokens"], answer["token_strs"][0]) == (with_bos, "<s>")
    echoed = {"prompt": "def main", "echo": True, "logprobs": 0, "max_tokens": 0}
    choice = httpx.post(url + "/v1/completions", json=echoed).json()["choices"][0]
    assert choice["text"] == "def main"
    assert choice["logprobs"]["tokens"][0] == "<s>"
    assert choice["logprobs"]["text_offset"][:2] == [0, 0]


def test_options_of_chats_need_messages_to_tokenize(served: Served) -> None:
    for name, value in (("add_generation_prompt", True), ("chat_template_kwargs", {"a": 1}), ("tools", [TOOL])):
        refused = post(served, "/tokenize", {"prompt": "x", name: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)


def test_detokenize_shows_special_tokens_and_takes_nothing(served: Served) -> None:
    tokens = ids(served, f"a{TURN_END}b")
    assert post(served, "/detokenize", {"tokens": tokens}).json() == {"prompt": f"a{TURN_END}b"}
    assert post(served, "/detokenize", {"tokens": []}).json() == {"prompt": ""}
