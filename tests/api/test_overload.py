"""More requests than may wait: refused at once with 503, counted, and nothing is left of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from moe_serve.api.state import ApiState
from tests.support.http_server import engines_of, make_state, serving

WAIT_SECONDS = 10.0


@pytest.fixture
def small(model_folder: Path) -> Iterator[tuple[str, ApiState]]:
    """Engines that run one request; two may wait."""
    state = make_state(model_folder, dp=1, max_num_queued_reqs=2, max_num_queued_tokens=100)
    engines_of(state).num_places = 1
    with serving(state) as url:
        yield url, state


def ask(url: str, prompt: str = "ab", **fields: object) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 2, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=WAIT_SECONDS)


def until(state: ApiState, num_waiting: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while state.admission.num_waiting != num_waiting:
        assert time.monotonic() < deadline, state.admission.num_waiting
        time.sleep(0.01)


def refused(url: str, reason: str) -> float:
    name = f'requests_refused_total{{model_name="fake-model",reason="{reason}"}}'
    line = next(line for line in httpx.get(url + "/metrics").text.splitlines() if name in line)
    return float(line.rsplit(" ", 1)[1])


def test_more_than_may_wait_get_503_with_retry_after_and_a_metric(small: tuple[str, ApiState]) -> None:
    url, state = small
    engines_of(state).hold_after = 0
    with ThreadPoolExecutor(4) as pool:
        held = [pool.submit(ask, url) for _ in range(3)]
        until(state, 3)
        answers = [ask(url), ask(url, n=3), httpx.post(f"{url}/v1/chat/completions", content=b"x" * 60_000)]
        assert [answer.status_code for answer in answers] == [503] * 3, "not even read"
        assert answers[0].headers["Retry-After"] == "5"
        assert "--max-num-queued-reqs" in answers[0].json()["error"]["message"]
        assert (refused(url, "queued_reqs"), refused(url, "queued_tokens")) == (3, 0)
        engines_of(state).hold_after = None
        assert [future.result().status_code for future in held] == [200] * 3
    assert ask(url).status_code == 200, "normal again"
    until(state, 0)


def test_prompts_that_wait_have_a_limit_and_the_next_is_refused_before_it_is_tokenized(
    small: tuple[str, ApiState],
) -> None:
    url, state = small
    engines_of(state).hold_after = 0
    engines_of(state).num_places = 10
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(ask, url, "word " * 150)
        while not engines_of(state).received:
            time.sleep(0.01)
        answer = ask(url, "word " * 50_000)
        assert (answer.status_code, "--max-num-queued-tokens" in answer.text) == (503, True)
        assert refused(url, "queued_tokens") == 1
        engines_of(state).hold_after = None
        assert held.result().status_code == 200
    assert ask(url, "word " * 50_000).status_code == 400, "alone it is judged by its length"
    until(state, 0)


def test_what_is_refused_or_fails_in_any_way_gives_its_place_back(small: tuple[str, ApiState]) -> None:
    url, state = small
    for body in (
        {"prompt": "x", "max_tokens": 10_000},
        {"prompt": [99_999]},
        {"prompt": "x", "stop_token_ids": [99_999]},
        {"prompt": "x", "logit_bias": {"99999": 1}},
    ):
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 400
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, headers={"X-data-parallel-rank": "7"}).is_error
    until(state, 0)


def test_sequences_of_one_request_are_one_group_at_the_engines(small: tuple[str, ApiState]) -> None:
    url, state = small
    ask(url, n=3)
    ask(url)
    groups = [each.group for each in engines_of(state).received]
    assert len(set(groups)) == 2
    assert len(set(groups[:3])) == 1
