"""Fields that clients of other servers send: neutral ones pass, others are refused, unknown ones are named once."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from moe_serve.api.known_fields import NEUTRAL, WITHOUT_EFFECT
from moe_serve.api.schemas import ChatBody, CompletionBody, TokenizeBody, parse
from moe_serve.api.unknown_fields import LINES_PER_SECOND, MAX_CLIENTS, MAX_NAMES, UnknownFields
from moe_serve.base.errors import RequestError
from tests.api.conftest import Served
from tests.support.http_server import engines_of, make_state, serving
from tests.support.tokenizer_folders import write_folder

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
BODIES: dict[type, dict[str, object]] = {
    CompletionBody: {"prompt": "x"},
    ChatBody: {"messages": MESSAGES},
    TokenizeBody: {"prompt": "x"},
}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# What vLLM's own request class has as its defaults, and so sends whoever dumps it whole.
VLLM_DEFAULTS: dict[str, object] = {
    "frequency_penalty": None,
    "logit_bias": None,
    "logprobs": False,
    "top_logprobs": 0,
    "response_format": None,
    "stream_options": None,
    "tools": None,
    "tool_choice": "none",
    "include_reasoning": True,
    "parallel_tool_calls": True,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "stop_token_ids": [],
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
    "prompt_logprobs": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "echo": False,
    "continue_final_message": False,
    "add_special_tokens": False,
    "documents": None,
    "chat_template": None,
    "mm_processor_kwargs": None,
    "structured_outputs": None,
    "priority": 0,
    "return_token_ids": None,
    "return_mm_kwargs": True,
    "routed_experts_prompt_start": 0,
    "cache_salt": None,
    "kv_transfer_params": None,
    "repetition_detection": None,
    "stream_interval": None,
}


def post(served: Served, path: str, body: object) -> httpx.Response:
    return httpx.post(served.url + path, json=body, headers=served.headers, timeout=30)


class Warnings(logging.Handler):
    """Keeps the lines about unknown fields."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def warnings() -> Iterator[Warnings]:
    log, kept = logging.getLogger("moe_serve.api.unknown_fields"), Warnings()
    log.addHandler(kept)
    yield kept
    log.removeHandler(kept)


# --- known fields ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
def test_every_known_field_is_accepted_at_each_value_that_asks_for_nothing(kind: type) -> None:
    for name in {*NEUTRAL, *WITHOUT_EFFECT} - set(kind.model_fields):
        for value in (None, *NEUTRAL.get(name, (True, False, 5, "x", ["y"]))):
            body = parse(kind, json.dumps(BODIES[kind] | {name: value}).encode())
            assert body.unknown_fields() == [], name


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
def test_every_known_field_whose_effect_is_lacking_is_refused_by_name(kind: type) -> None:
    for name in set(NEUTRAL) - set(kind.model_fields):
        for value in (17, "something", {"some": "thing"}, ["something"]):
            with pytest.raises(RequestError, match=f"^{name} .* is not supported; allowed: null") as caught:
                parse(kind, json.dumps(BODIES[kind] | {name: value}).encode())
            assert caught.value.param == name


@pytest.mark.parametrize(
    ("path", "field", "words"),
    [
        (CHAT, {"max_new_tokens": 5}, "here it is max_tokens"),
        (CHAT, {"use_beam_search": True}, "allowed: null, false"),
        (CHAT, {"length_penalty": 0.5}, "allowed: null, 1"),
        (CHAT, {"length_penalty": True}, "length_penalty True is not supported"),
        (CHAT, {"response_format": {"type": "json_object"}}, 'allowed: null, {"type": "text"}'),
        (CHAT, {"tools": [TOOL], "tool_choice": "required"}, 'allowed: null, "auto", "none"'),
        (CHAT, {"guided_json": {}}, "guided_json {} is not supported"),
        (CHAT, {"cache_salt": "secret"}, "cache_salt"),
        (COMPLETIONS, {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        (COMPLETIONS, {"max_completion_tokens": 3}, "here it is max_tokens"),
        (COMPLETIONS, {"messages": MESSAGES}, "/v1/chat/completions"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_refusal_says_what_is_allowed_and_what_has_the_effect_here(
    served: Served, path: str, field: dict[str, object], words: str
) -> None:
    body = {"prompt": "x"} if path == COMPLETIONS else {"messages": MESSAGES}
    refused = post(served, path, body | field)
    assert refused.status_code == 400
    assert words in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] in field


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, VLLM_DEFAULTS),
        (CHAT, {"tools": [], "tool_choice": "auto"}),
        (CHAT, {"tools": [], "tool_choice": "none", "functions": [], "function_call": "auto"}),
        (CHAT, {"response_format": {"type": "text", "json_schema": None}}),
        (CHAT, {"logprobs": 0, "top_logprobs": False}),
        (CHAT, {"stream": False, "stream_options": {}}),
        (CHAT, {"stream": None, "stream_options": {"include_usage": False, "continuous_usage_stats": False}}),
        (COMPLETIONS, {"logprobs": False, "best_of": 1, "suffix": "", "response_format": {"type": "text"}}),
        (COMPLETIONS, {"cache_prompt": True, "mirostat": 0, "mirostat_tau": 5.0, "typical_p": 1.0, "id_slot": -1}),
        ("/tokenize", {"tools": [], "chat_template_kwargs": {}}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_asks_for_nothing_is_served_without_a_warning(
    served: Served, warnings: Warnings, path: str, fields: dict[str, object]
) -> None:
    body: dict[str, object] = {"messages": MESSAGES} if path == CHAT else {"prompt": "x"}
    plain = post(served, path, body).json()
    answer = post(served, path, body | fields)
    assert answer.status_code == 200, answer.text
    assert answer.json().get("usage") == plain.get("usage")
    assert warnings.messages == []


def test_special_tokens_are_added_to_a_chat_that_asks_for_them(tmp_path: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None}
    state = make_state(write_folder(tmp_path, "sentence_pieces", config=names), dp=1)
    with serving(state) as url:
        for field in ({}, {"add_special_tokens": True}):
            body = {"messages": MESSAGES, "max_tokens": 1, **field}
            assert httpx.post(url + CHAT, json=body).status_code == 200
    without, added = (received.token_ids for received in engines_of(state).received)
    assert added == [1, *without]


# --- unknown fields --------------------------------------------------------------------------------------------


def test_unknown_fields_are_ignored_and_named_once_for_each_client_and_field(
    served: Served, warnings: Warnings
) -> None:
    body = {"messages": MESSAGES, "max_tokens": 2, "temperature": 0}
    plain = post(served, CHAT, body).json()["choices"]
    extra = {"no_such": 1, "stream": False, "stream_options": {"nor_such": True}}
    for _ in range(3):
        assert post(served, CHAT, body | extra).json()["choices"] == plain
    assert post(served, CHAT, body | extra | {"another": None}).status_code == 200
    first, second = warnings.messages
    assert "127.0.0.1 sends unknown fields" in first
    assert "'no_such', 'stream_options.nor_such'" in first
    assert "--strict-fields" in first
    assert "no_such" not in second
    assert "'another'" in second


def test_strict_fields_refuses_unknown_ones_and_takes_neutral_ones(model_folder: Path) -> None:
    with serving(make_state(model_folder, strict_fields=True)) as url:
        body = {"messages": MESSAGES, "max_tokens": 1}
        for extra, name in (
            ({"no_such": None}, "no_such"),
            ({"stream": True, "stream_options": {"nor_such": 1}}, "stream_options.nor_such"),
        ):
            refused = httpx.post(url + CHAT, json=body | extra)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == name
            assert f"unrecognized field: '{name}'" in refused.json()["error"]["message"]
        assert httpx.post(url + CHAT, json=body | VLLM_DEFAULTS).status_code == 200


def test_names_that_nobody_means_well_are_refused(served: Served, warnings: Warnings) -> None:
    many = dict.fromkeys(map(str, range(MAX_NAMES + 1)), 1)
    for extra in ({"x" * 101: 1}, many):
        assert "unrecognized field" in post(served, COMPLETIONS, {"prompt": "x"} | extra).json()["error"]["message"]
    assert warnings.messages == []
    assert post(served, COMPLETIONS, {"prompt": "x", "a\nb\x1b[31m": 1}).status_code == 200
    (line,) = warnings.messages
    assert line.isascii()
    assert line.isprintable()


def test_each_client_hears_of_its_own_fields(warnings: Warnings) -> None:
    fields = UnknownFields(clock=lambda: 0.0)
    for client in ("10.0.0.1", "10.0.0.2", "10.0.0.1"):
        fields.meet(client, ["a"])
    assert [line.split()[0] for line in warnings.messages] == ["10.0.0.1", "10.0.0.2"]


def test_what_a_stranger_can_make_us_remember_and_write_has_a_bound(warnings: Warnings) -> None:
    now = 0.0
    fields = UnknownFields(clock=lambda: now)
    for number in range(3 * MAX_NAMES):
        now += 1
        fields.meet("10.0.0.1", [f"name{number}"])
    assert len(warnings.messages) == MAX_NAMES
    for number in range(2 * MAX_CLIENTS):
        now += 1
        fields.meet(f"client {number}", ["a"])
    assert len(fields._told) == MAX_CLIENTS


def test_a_warning_that_was_held_back_comes_with_the_clients_next_request(warnings: Warnings) -> None:
    now = 0.0
    fields = UnknownFields(clock=lambda: now)
    for number in range(LINES_PER_SECOND + 1):
        fields.meet(f"client {number}", ["a"])
    assert len(warnings.messages) == LINES_PER_SECOND
    now = 1.5
    fields.meet(f"client {LINES_PER_SECOND}", ["a"])
    assert warnings.messages[-1].startswith(f"client {LINES_PER_SECOND} ")


# --- usage in every chunk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_comes_with_every_chunk_where_it_is_asked_for(served: Served, path: str) -> None:
    letters = [served.state.tokenizer.encode(letter)[0] for letter in "abcd"]
    served.engines.script = lambda prompt, sampling: letters
    body: dict[str, object] = {"messages": MESSAGES} if path == CHAT else {"prompt": "x"}
    options = {"include_usage": True, "continuous_usage_stats": True}
    body |= {"n": 2, "seed": 1, "max_tokens": 4, "ignore_eos": True, "stream": True, "stream_options": options}
    *events, done, _ = post(served, path, body).text.split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 8)
    assert set(counts) == set(range(1, 9)), "the counts are of what the stream has told, not of what is still to come"
    for chunk in chunks:
        used = chunk["usage"]
        assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
        assert used["prompt_tokens"] == chunks[-1]["usage"]["prompt_tokens"] > 0
    assert chunks[-1]["choices"] == []


def test_usage_in_every_chunk_needs_include_usage(served: Served) -> None:
    body = {"prompt": "x", "stream": True, "stream_options": {"continuous_usage_stats": True}}
    text = post(served, COMPLETIONS, body).text
    assert text.endswith("data: [DONE]\n\n")
    assert "usage" not in text
