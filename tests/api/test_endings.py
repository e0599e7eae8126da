"""How answers end other than well: dead engines, refusals, failures, draining, clients that leave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest

from moe_serve.base.errors import Overloaded, RequestError
from tests.api.conftest import Served
from tests.support.http_server import MODEL

WAIT_SECONDS = 10.0
BODY = {"prompt": "In the beginning", "max_tokens": 30, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 30, "ignore_eos": True}
REQUESTS = [("/v1/completions", BODY), ("/v1/chat/completions", CHAT)]


def post(served: Served, path: str, body: object) -> httpx.Response:
    return httpx.post(served.url + path, json=body, headers=served.headers, timeout=30)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def open_stream(served: Served, path: str, body: dict[str, object]) -> Iterator[str]:
    """The data of each event."""
    with httpx.stream(
        "POST", served.url + path, json=body | {"stream": True}, headers=served.headers, timeout=30
    ) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line:
                yield line.removeprefix("data: ")


# --- death -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_every_open_stream_ends_with_an_error_event_when_an_engine_dies(
    served: Served, path: str, body: dict[str, object]
) -> None:
    served.engines.hold_after = 3
    streams = [open_stream(served, path, body) for _ in range(4)]
    firsts = [json.loads(next(stream)) for stream in streams]
    assert all("choices" in first for first in firsts)
    served.engines.die("engine dp 1 (pid 7) was killed by SIGKILL")
    for stream in streams:
        *_, last = stream
        error = json.loads(last)["error"]
        assert error["code"] == "engine_dead"
        assert "dp 1" in error["message"]


def test_the_openai_client_raises_when_a_stream_dies(served: Served) -> None:
    served.engines.hold_after = 2
    stream = served.client.completions.create(model=MODEL, stream=True, prompt="x", max_tokens=9)
    next(iter(stream))
    served.engines.die()
    with pytest.raises(openai.APIError, match="killed"):
        list(stream)


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_an_unfinished_answer_becomes_a_503_when_an_engine_dies(
    served: Served, path: str, body: dict[str, object]
) -> None:
    served.engines.hold_after = 3
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(post(served, path, body)))
    asking.start()
    until(lambda: served.engines.num_running)
    served.engines.die()
    asking.join(WAIT_SECONDS)
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "engine_dead")


def test_after_a_death_the_probes_and_new_requests_say_so(served: Served) -> None:
    served.engines.die("engine dp 0 is gone")
    for path in ("/readyz", "/health"):
        probe = httpx.get(served.url + path)
        assert (probe.status_code, probe.json()["reason"]) == (503, "engine dp 0 is gone")
    assert httpx.get(served.url + "/livez").status_code == 200
    assert httpx.get(served.url + "/metrics").status_code == 200
    for path, body in REQUESTS:
        refused = post(served, path, body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")


# --- starting and stopping -------------------------------------------------------------------------------------


def test_before_the_engines_are_there_requests_are_told_to_come_again(served: Served) -> None:
    served.engines.ready = False
    assert httpx.get(served.url + "/livez").status_code == 200
    assert httpx.get(served.url + "/health").status_code == 200
    assert httpx.get(served.url + "/readyz").status_code == 503
    for path, body in REQUESTS:
        refused = post(served, path, body)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
    assert httpx.get(served.url + "/v1/models", headers=served.headers).json()["data"][0]["max_model_len"] is None


def test_a_draining_server_finishes_what_it_has_and_refuses_the_rest(served: Served) -> None:
    served.engines.hold_after = 2
    stream = open_stream(served, "/v1/completions", BODY)
    next(stream)
    served.state.start_draining(retry_after=7)
    for path, body in REQUESTS:
        refused = post(served, path, body)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "7")
        assert "shutting down" in refused.json()["error"]["message"]
    assert httpx.get(served.url + "/readyz").status_code == 503
    assert httpx.get(served.url + "/health").status_code == 200
    served.engines.hold_after = None
    *_, last = stream
    assert last == "[DONE]"


# --- refusals and failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status"),
    [(RequestError("no room for this", param="prompt"), 400), (Overloaded("not now"), 503), (KeyError("bug"), 500)],
)
def test_what_the_engines_refuse_at_once_is_a_status_not_an_event(
    served: Served, refusal: Exception, status: int, stream: bool
) -> None:
    served.engines.refusal = refusal
    for path, body in REQUESTS:
        answer = post(served, path, body | {"stream": stream})
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("failure", [RequestError("too much for me"), KeyError("secret detail")])
def test_a_failure_in_the_middle_ends_the_stream_with_an_error(served: Served, failure: Exception) -> None:
    served.engines.failure, served.engines.seconds_per_event = failure, 0.02
    *begun, last = open_stream(served, "/v1/completions", BODY)
    assert len(begun) <= 1
    message = json.loads(last)["error"]["message"]
    assert "too much" in message or "internal error" in message
    assert "secret" not in message
    assert post(served, "/v1/completions", BODY).status_code in (400, 500)
    served.engines.failure = None
    assert post(served, "/v1/completions", BODY).status_code == 200


def test_one_failing_choice_ends_the_others(served: Served) -> None:
    served.engines.failure = RequestError("too much")
    assert post(served, "/v1/completions", BODY | {"n": 3}).status_code == 400
    until(lambda: not served.engines.num_running)


# --- leaving ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_a_client_that_leaves_aborts_all_its_choices(
    served: Served, path: str, body: dict[str, object], stream: bool
) -> None:
    served.engines.hold_after = 2
    with httpx.Client(timeout=0.3) as client, pytest.raises(httpx.ReadTimeout):
        client.post(served.url + path, json=body | {"stream": stream, "n": 3}, headers=served.headers)
    until(lambda: not served.engines.num_running)
    assert len(served.engines.aborted) == 3


def test_a_client_that_leaves_before_the_first_token_aborts(served: Served) -> None:
    served.engines.hold_after = 0
    for stream in (False, True):
        with httpx.Client(timeout=0.3) as client, pytest.raises(httpx.ReadTimeout):
            client.post(served.url + "/v1/completions", json=BODY | {"stream": stream}, headers=served.headers)
    until(lambda: len(served.engines.aborted) == 2)


def test_a_stop_string_frees_the_engine_at_once(served: Served) -> None:
    text = post(served, "/v1/completions", BODY | {"temperature": 0}).json()["choices"][0]["text"]
    served.engines.aborted.clear()
    post(served, "/v1/completions", BODY | {"temperature": 0, "stop": text[3:5]})
    until(lambda: len(served.engines.aborted) == 1)


def test_a_slow_reader_delays_nobody_else(served: Served) -> None:
    with httpx.stream(
        "POST",
        served.url + "/v1/completions",
        json=BODY | {"stream": True, "max_tokens": 200},
        headers=served.headers,
    ) as slow:
        assert slow.status_code == 200
        assert post(served, "/v1/completions", BODY).status_code == 200
        slow.read()
        assert slow.text.endswith("data: [DONE]\n\n")


@pytest.mark.long
def test_sixty_four_streams_at_once_each_get_their_own_answer(served: Served) -> None:
    served.engines.seconds_per_event = 0.001
    bodies = [BODY | {"prompt": f"number {n}", "temperature": 0, "max_tokens": 5 + n % 20} for n in range(64)]
    alone = [post(served, "/v1/completions", body).json()["choices"][0]["text"] for body in bodies[:6]]
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        events = [json.loads(e) for e in open_stream(served, "/v1/completions", bodies[number]) if e != "[DONE]"]
        texts[number] = "".join(event["choices"][0]["text"] for event in events)

    asking = [threading.Thread(target=ask, args=(number,)) for number in range(64)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(60)
    assert len(texts) == 64
    assert [texts[number] for number in range(6)] == alone
    assert {received.rank for received in served.engines.received} == {0, 1}
