"""What a running server tells: lines about requests, refusals and throughput, and HEAD."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from moe_serve.api.metrics import Metrics, RequestClock
from moe_serve.api.throughput import Throughput
from moe_serve.base.engine_messages import LoadReport
from moe_serve.base.log import Sparingly
from tests.api.conftest import Served
from tests.support.http_server import make_state, serving


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    logging.getLogger("moe_serve").propagate = True
    caplog.set_level(logging.INFO, "moe_serve")
    return caplog.messages


def told(caplog: pytest.LogCaptureFixture, words: str, *, count: int = 1) -> list[str]:
    """Lines with these words; the last may come a moment after the answer."""
    deadline = time.monotonic() + 5
    while len(found := [line for line in caplog.messages if words in line]) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def test_each_request_has_a_line_with_its_status_and_time(
    served: Served, caplog: pytest.LogCaptureFixture, lines: list[str]
) -> None:
    httpx.get(served.url + "/v1/models", headers=served.headers)
    line = told(caplog, "/v1/models")[0]
    assert line.startswith("127.0.0.1:")
    assert '"GET /v1/models" 200 0.' in line


def test_a_refused_request_has_a_line_that_says_why_and_a_count(
    served: Served, caplog: pytest.LogCaptureFixture, lines: list[str]
) -> None:
    before = httpx.get(served.url + "/metrics").text
    httpx.get(served.url + "/v1/models")
    httpx.post(served.url + "/v1/completions", headers=served.headers, json={"prompt": "x", "temperature": -1})
    refusals = told(caplog, "refused", count=2)
    assert ": 401 a valid API key is needed" in refusals[0]
    assert "temperature" in refusals[1]
    after = httpx.get(served.url + "/metrics").text
    for reason in ("key", "request"):
        assert count(after, reason) == count(before, reason) + 1


def count(text: str, reason: str) -> float:
    line = next(each for each in text.splitlines() if f'reason="{reason}"' in each)
    return float(line.rsplit(" ", 1)[1])


def test_a_client_cannot_write_lines_of_its_own(
    served: Served, caplog: pytest.LogCaptureFixture, lines: list[str]
) -> None:
    httpx.get(served.url + "/x%0a12:00:00%20ERROR%20%1b[31m" + "y" * 5000, headers=served.headers)
    found = told(caplog, "/x", count=2)
    assert len(found) == 2
    assert all(line.isascii() and line.isprintable() and len(line) < 1000 for line in found)


def test_lines_about_requests_can_be_switched_off(
    model_folder: Path, caplog: pytest.LogCaptureFixture, lines: list[str]
) -> None:
    with serving(make_state(model_folder, access_log=False)) as url:
        httpx.get(url + "/v1/models")
        httpx.get(url + "/no/such")
    assert [line for line in caplog.messages if "/v1/models" in line] == []
    assert any(line.startswith("refused GET /no/such") for line in caplog.messages)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/version", "/metrics", "/config", "/v1/models"])
def test_head_is_a_get_without_its_body(served: Served, path: str) -> None:
    head, get = (httpx.request(method, served.url + path, headers=served.headers) for method in ("HEAD", "GET"))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Type"] == get.headers["Content-Type"]


def test_lines_that_a_stranger_can_cause_are_few_and_say_how_many_more_there_were() -> None:
    now = 0.0
    sparing = Sparingly(burst=2, seconds=1, clock=lambda: now)

    def passed(message: str, number: int) -> str | None:
        record = logging.LogRecord("x", logging.INFO, "", 0, message, (number,), None)
        return record.getMessage() if sparing.filter(record) else None

    assert [passed("one %d", number) for number in range(5)] == ["one 0", "one 1", None, None, None]
    assert passed("other %d", 7) == "other 7", "another kind has a count of its own"
    now = 1.5
    assert passed("one %d", 5) == "one 5 (and 3 more like it)"
    assert passed("one %d", 6) == "one 6"


def test_throughput_is_told_while_there_is_traffic_and_not_when_there_is_none() -> None:
    reports = {0: LoadReport(num_running=3, num_blocks=10, free_blocks=5, prefix_cache_queries=10, prefix_cache_hits=4)}
    metrics, waiting = Metrics("m", range(1), dict), 2
    throughput = Throughput(metrics, lambda: reports, lambda: waiting)
    clock = RequestClock(metrics, 100, 0.0)
    clock.tokens(20, 0)
    assert throughput.line(10.0) == (
        "throughput: prompt 10.0 tokens/s, generation 2.0 tokens/s; running 3 requests, waiting 2; "
        "KV cache usage 50.0 %, prefix cache hit rate 40.0 %"
    )
    waiting = 0
    assert throughput.line(10.0) is None
    clock.tokens(5, 0)
    assert "generation 0.5 tokens/s" in (throughput.line(10.0) or "")
