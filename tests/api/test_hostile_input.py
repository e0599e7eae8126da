"""Bodies and requests that nobody means well by: an error in OpenAI's shape, and the next request is served."""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Iterator

import httpx
import pytest

from moe_serve.api.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse
from moe_serve.base.errors import RequestError
from tests.api.conftest import Served
from tests.support.bad_requests import BAD

KINDS: dict[str, type[CompletionBody | ChatBody | TokenizeBody | DetokenizeBody]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
DEEP = 90_000
MESSAGES = [{"role": "user", "content": "x"}]


def send(served: Served, path: str, body: bytes, **headers: str) -> httpx.Response:
    given = served.headers | {"content-type": "application/json"} | headers
    return httpx.post(served.url + path, content=body, headers=given, timeout=30)


def assert_refused(answer: httpx.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    message: str = error["message"]
    assert 0 < len(message) < 600
    return message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"5",
        b"[]",
        b'"prompt"',
        b"\xff\xfe{}",
        b'\xef\xbb\xbf{"prompt": "x"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00\\ud800"}',
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": -Infinity}',
        b'{"prompt": "x", "n": 1' + b"0" * 6000 + b"}",
        b'{"prompt": [1' + b"0" * 4000 + b"]}",
        b'{"tokens": [1' + b"0" * 4000 + b"]}",
        b'{"prompt": "x", "prompt": 5}',
        b"[" * DEEP,
        b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"metadata": ' + b'{"a":' * 150 + b"1" + b"}" * 150 + b"}",
        b'{"messages": ' + b"[" * 150 + b"]" * 150 + b"}",
        b'{"prompt": "x", "' + b"k" * 100_000 + b'": 1}',
        b'{"prompt": "x", "model": "' + b"m" * 100_000 + b'"}',
    ],
    ids=lambda body: repr(body[:48]),
)
def test_a_body_that_is_not_meant_well_is_refused(served: Served, body: bytes) -> None:
    for path in PATHS:
        answer = send(served, path, body)
        assert answer.status_code in (400, 404), f"{path}: {answer.text}"
        assert_refused(answer, answer.status_code)
    assert not served.engines.received


TOO_LARGE = (b'"temperature": 1e999', b'"logit_bias": {"1": 1e999}', b'"top_k": -1' + b"0" * 4000)


@pytest.mark.parametrize("field", TOO_LARGE, ids=lambda field: repr(field[:20]))
def test_a_number_that_nothing_can_be_is_refused_where_it_has_a_meaning(served: Served, field: bytes) -> None:
    assert_refused(send(served, "/v1/completions", b'{"prompt": "x", ' + field + b"}"))
    chat = b'{"messages": [{"role": "user", "content": "x"}], ' + field + b"}"
    assert_refused(send(served, "/v1/chat/completions", chat))
    assert not served.engines.received


def test_deeply_nested_messages_that_reach_the_template_are_no_failure(served: Served) -> None:
    nested = json.loads("[" * 120 + "]" * 120)
    body = {"messages": [{"role": "user", "content": "x", "extra": nested}], "max_tokens": 1}
    assert send(served, "/v1/chat/completions", json.dumps(body).encode()).status_code == 200


def test_of_a_field_given_twice_the_last_counts(served: Served) -> None:
    answer = send(served, "/v1/completions", b'{"prompt": 5, "prompt": "x", "max_tokens": 2}')
    assert answer.status_code == 200


def test_nul_and_control_characters_are_text(served: Served) -> None:
    body = json.dumps({"prompt": "\x00\x1b[2J\x7f\u202e", "max_tokens": 2, "stop": ["\x00"]}).encode()
    assert send(served, "/v1/completions", body).status_code == 200


@pytest.mark.parametrize("declared", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_body_declared_as_something_else_is_refused(served: Served, declared: str) -> None:
    message = assert_refused(send(served, "/v1/completions", b'{"prompt": "x"}', **{"content-type": declared}), 415)
    assert "application/json" in message


def test_json_with_a_charset_or_undeclared_is_accepted(served: Served) -> None:
    body = b'{"prompt": "x", "max_tokens": 1}'
    assert send(served, "/v1/completions", body, **{"content-type": "Application/JSON; charset=utf-8"}).is_success
    request = httpx.Request("POST", f"{served.url}/v1/completions", content=body, headers=served.headers)
    assert "content-type" not in request.headers
    with httpx.Client() as client:
        assert client.send(request).status_code == 200


def test_many_answers_at_once_have_a_limit(served: Served) -> None:
    body = {"prompt": ["x"] * 100, "n": 100, "max_tokens": 1}
    assert "2048" in assert_refused(send(served, "/v1/completions", json.dumps(body).encode()))
    assert not served.engines.received


def test_many_long_stop_strings_have_a_limit(served: Served) -> None:
    for stop in (["x"] * 33, ["x" * 1025]):
        body = json.dumps({"prompt": "x", "stop": stop}).encode()
        assert "stop" in assert_refused(send(served, "/v1/completions", body))


# --- sizes -----------------------------------------------------------------------------------------------------


def test_an_announced_body_over_the_limit_is_refused(served: Served) -> None:
    body = b'{"prompt": "' + b"x" * 300_000 + b'"}'
    answer = send(served, "/v1/completions", body)
    assert answer.json()["error"]["code"] == "body_too_large"
    assert "--max-body-bytes" in assert_refused(answer, 413)


def test_a_large_announced_body_gets_its_answer_not_a_broken_pipe(served: Served) -> None:
    for _ in range(5):
        assert send(served, "/v1/completions", b"x" * 2_000_000).status_code == 413


def test_a_chunked_body_over_the_limit_is_refused(served: Served) -> None:
    def chunks(count: int) -> Iterator[bytes]:
        for _ in range(count):
            yield b"x" * 10_000

    given = served.headers | {"content-type": "application/json"}
    for count in (25, 200):
        answer = httpx.post(f"{served.url}/v1/completions", content=chunks(count), headers=given, timeout=30)
        assert_refused(answer, 413)


def test_a_client_that_asks_first_is_refused_before_it_sends(served: Served) -> None:
    with connect(served) as raw:
        raw.sendall(raw_head(served, "expect: 100-continue\r\ncontent-length: 300000"))
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
    assert_serves(served)
    with connect(served) as raw:
        raw.sendall(raw_head(served, "expect: 100-continue\r\ncontent-length: 2"))
        assert raw.recv(100).startswith(b"HTTP/1.1 100")
        raw.sendall(b"{}")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


def test_a_large_body_under_the_limit_is_read(served: Served) -> None:
    body = json.dumps({"tokens": [1] * 60_000}).encode()
    assert len(body) > 150_000
    assert send(served, "/detokenize", body).status_code == 200
    refused = send(served, "/detokenize", json.dumps({"tokens": ["x"] * 30_000}).encode())
    assert "tokens" in assert_refused(refused)


def test_a_body_that_never_ends_is_cut_off(served: Served) -> None:
    head = raw_head(served, "transfer-encoding: chunked")
    with connect(served) as raw:
        raw.sendall(head)
        chunk = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
        sent = 0
        try:
            while sent < 100_000_000:
                raw.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
    assert sent < 100_000_000, "the server read on for ever"
    assert_serves(served)


@pytest.mark.parametrize(
    "header", ["content-length: -5", "content-length: x", "content-length: 1\r\nContent-Length: 2"]
)
def test_a_body_of_nonsense_length_is_refused_by_the_protocol(served: Served, header: str) -> None:
    with connect(served) as raw:
        raw.sendall(raw_head(served, header) + b"{}")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


def test_a_client_that_leaves_in_the_middle_of_its_body_is_forgotten(served: Served) -> None:
    for _ in range(20):
        with connect(served) as raw:
            raw.sendall(raw_head(served, "content-length: 1000") + b'{"prompt": "x')
    assert_serves(served)
    assert len(served.engines.received) == 1


def raw_head(served: Served, header: str) -> bytes:
    key = served.headers["Authorization"]
    return (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"authorization: {key}\r\n{header}\r\n\r\n"
    ).encode()


def connect(served: Served) -> socket.socket:
    host, _, port = served.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


def assert_serves(served: Served) -> None:
    assert send(served, "/v1/completions", b'{"prompt": "x", "max_tokens": 1}').status_code == 200


def test_nothing_keeps_a_refused_body() -> None:
    """An error among its own frames or causes is a circle: it holds all that was parsed until a collection looks."""
    refuse_all()
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)  # what was found unreachable is in gc.garbage
    try:
        refuse_all()
        gc.collect()
        kept = [found for found in gc.garbage if isinstance(found, RequestError)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert kept == []


def refuse_all() -> None:
    for path, body, _, _ in BAD:
        try:
            parse(KINDS[path], json.dumps(body).encode())
        except RequestError:
            continue
