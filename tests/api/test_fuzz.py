"""Random bodies, from nearly right to nonsense: never a 5xx, always a body of the right shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from moe_serve.api.known_fields import NEUTRAL
from moe_serve.api.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tests.support.http_server import MODEL, make_state, serving

PHASES = (Phase.explicit, Phase.generate, Phase.shrink)  # no example database in the repository
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES, database=None)
CONTEXT = 40

NUMBERS = st.one_of(
    st.integers(-3, 30),
    st.sampled_from([0, -0.0, 1e-320, 1e308, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, True]),
    st.floats(allow_nan=False, allow_infinity=False),
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", " ", "\x00", "<|im_end|>", "<|im_start|>user\n", "{{ x }}", "🙃" * 5, "x" * 3000, MODEL]),
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
IDS = st.lists(st.integers(0, 400), min_size=1, max_size=6)
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
PARTS = st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS})
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": TEXTS | st.lists(PARTS, max_size=2)}), min_size=1, max_size=2
)

# Mostly right values for the fields where a random one never is.
LIKELY: dict[str, st.SearchStrategy[object]] = {
    "prompt": TEXTS | IDS | st.lists(TEXTS, max_size=3) | st.lists(IDS, max_size=3),
    "messages": MESSAGES,
    "model": st.just(MODEL),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(0, 5),
    "max_completion_tokens": st.integers(1, 5),
    "min_tokens": st.integers(0, 3),
    "logprobs": st.integers(0, 3) | st.booleans(),
    "top_logprobs": st.integers(0, 3),
    "logit_bias": st.dictionaries(st.integers(0, 500).map(str), st.integers(-100, 100), max_size=3),
    "stop": TEXTS | st.lists(TEXTS, max_size=3),
    "stop_token_ids": IDS,
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "tokens": st.lists(st.integers(0, 400), max_size=5),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "suffix": st.just(""),
    "best_of": st.none(),
    "echo": st.booleans(),
    "stream": st.booleans(),
    "response_format": st.just({"type": "text"}),
    "chat_template_kwargs": st.dictionaries(TEXTS, VALUES, max_size=2),
    "tools": st.lists(st.just({"type": "function", "function": {"name": "f"}}), max_size=1),
}
FLAGS = st.booleans() | st.none()
REQUIRED = {
    "/v1/completions": ("prompt",),
    "/v1/chat/completions": ("messages",),
    "/tokenize": (),
    "/detokenize": ("tokens",),
}
FIELDS = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}


@st.composite
def bodies(draw: st.DrawFn, path: str) -> dict[str, object]:
    """A body whose fields are known ones; now and then one has a value that it cannot have."""
    names = draw(st.lists(st.sampled_from(sorted(FIELDS[path].model_fields)), max_size=5, unique=True))
    body: dict[str, object] = {"stream": True} if "stream_options" in names else {}
    for name in sorted({*REQUIRED[path], *names}):  # not as strings happen to be hashed in this run
        likely = LIKELY[name] if name in LIKELY else by_type(str(FIELDS[path].model_fields[name].annotation))
        body[name] = draw(VALUES if draw(st.integers(0, 19)) == 0 else likely)
    for name in draw(st.lists(st.sampled_from(sorted(NEUTRAL)) | TEXTS, max_size=2)):
        neutral = st.sampled_from((None, *NEUTRAL.get(name, (1, {}))))
        body.setdefault(name, draw(VALUES if draw(st.integers(0, 19)) == 0 else neutral))
    return body


def by_type(annotation: str) -> st.SearchStrategy[object]:
    """A value that a field of this type may have."""
    kinds = {"bool": FLAGS, "float": st.floats(0.1, 1), "dict": st.just({}), "int": st.integers(1, 2), "str": TEXTS}
    return next((strategy for kind, strategy in kinds.items() if kind in annotation), st.none())


@pytest.fixture(scope="module")
def http(model_folder: Path) -> Iterator[httpx.Client]:
    state = make_state(model_folder, max_model_len=CONTEXT)
    with serving(state) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def check(http: httpx.Client, path: str, content: bytes) -> bool:
    """Whether the body was accepted; asserts that the answer has the right shape."""
    answer = http.post(path, content=content, headers={"content-type": "application/json"})
    if answer.status_code != 200:
        assert answer.status_code in (400, 404, 413), f"{content!r}: {answer.status_code} {answer.text}"
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return False
    if answer.headers["content-type"].startswith("text/event-stream"):
        *events, end, rest = answer.text.split("\n\n")
        assert (end, rest) == ("data: [DONE]", ""), f"{content!r}: {answer.text}"
        assert all("error" not in json.loads(event.removeprefix("data: ")) for event in events)
    else:
        assert "error" not in answer.json()
    return True


@pytest.mark.parametrize("path", FIELDS)
@FUZZ
@given(data=st.data())
def test_a_nearly_right_body_never_breaks_the_server(http: httpx.Client, path: str, data: st.DataObject) -> None:
    check(http, path, json.dumps(data.draw(bodies(path))).encode())


@FUZZ
@given(path=st.sampled_from(sorted(FIELDS)), body=VALUES | st.dictionaries(TEXTS, VALUES, max_size=4))
def test_any_json_never_breaks_the_server(http: httpx.Client, path: str, body: object) -> None:
    check(http, path, json.dumps(body).encode())


@FUZZ
@given(path=st.sampled_from(sorted(FIELDS)), content=st.binary(max_size=60), cut=st.integers(0, 60))
def test_any_bytes_never_break_the_server(http: httpx.Client, path: str, content: bytes, cut: int) -> None:
    right = b'{"prompt": "x", "stream": true, "max_tokens": 2}'
    check(http, path, right[:cut] + content + right[cut:])


@pytest.mark.parametrize("path", FIELDS)
def test_some_of_the_fuzzed_bodies_are_accepted(http: httpx.Client, path: str) -> None:
    accepted = 0

    @settings(FUZZ, max_examples=60, derandomize=True)
    @given(body=bodies(path))
    def count(body: dict[str, object]) -> None:
        nonlocal accepted
        accepted += check(http, path, json.dumps(body).encode())

    count()
    assert accepted, "else nothing but refusals is tested"
