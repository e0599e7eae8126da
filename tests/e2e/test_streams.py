"""Many streams at once on two data-parallel ranks: each answer is the one its request gets alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.letters import write_letters
from tests.support.server import Server, serving
from tests.support.tiny_model import tiny_model

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

VOCAB = 131


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(folder, "qwen3_moe", seed=5)
    write_letters(folder, VOCAB)
    with serving(str(folder), "--dtype", "float32", "-dp", "2", "-ep") as running:
        yield running


def mixed_requests(count: int) -> list[dict[str, Any]]:
    """Prompts of 1 to 120 tokens, answers of 1 to 60; every other one drawn at random with a seed of its own."""
    numbers = random.Random(11)
    requests = []
    for number in range(count):
        request: dict[str, Any] = {
            "prompt": [numbers.randrange(3, VOCAB) for _ in range(numbers.randint(1, 120))],
            "max_tokens": numbers.randint(1, 60),
            "ignore_eos": True,
        }
        if number % 2:
            request |= {"temperature": 0.8, "top_p": 0.9, "seed": number}
        requests.append(request)
    return requests


def streamed(server: Server, request: dict[str, Any]) -> tuple[str, str]:
    """The whole text, and why it ended."""
    events = list(server.stream(**request))
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


@pytest.mark.long
def test_64_streams_at_once_each_equal_what_they_get_alone(server: Server) -> None:
    requests = mixed_requests(64)
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda request: streamed(server, request), requests))
    alone = [streamed(server, request) for request in requests]
    assert together == alone
    assert [len(text) for text, _ in together] == [request["max_tokens"] for request in requests]
    running = [
        line for line in server.get("/metrics").text.splitlines() if line.startswith("moe_serve:dummy_steps_total{")
    ]
    assert len(running) == 2, "both engines report"


@pytest.mark.long
def test_both_ranks_get_work_and_a_pinned_request_goes_where_it_was_sent(server: Server) -> None:
    served = []
    for rank in ("0", "1", "1", "0"):
        answer = server.post("/v1/completions", {"prompt": [5, 6], "max_tokens": 1}, {"X-data-parallel-rank": rank})
        served.append(answer.headers["X-data-parallel-rank"])
    assert served == ["0", "1", "1", "0"]
