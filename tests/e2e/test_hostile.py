"""One request cannot end or stall the others, whatever it holds. A real server with two engines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.bad_requests import LARGE, MAX_REFUSAL_CHARACTERS
from tests.support.letters import ids_of, write_letters
from tests.support.server import Server, serving
from tests.support.tiny_model import tiny_model

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]

STREAMS = 8
WATCH_SECONDS = 3.0
LONGEST_STALL_SECONDS = 1.0
"""Of a stream, beyond its longest gap while nobody sends anything hostile: that one is the machine's own."""
PART_BYTES = 1 << 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("model")
    tiny_model(folder, "qwen3_moe", seed=5)
    write_letters(folder, 131)
    with serving(str(folder), "--dtype", "float32", "-dp", "2", "-ep") as running:
        yield running


def longest_gap(server: Server, until: float) -> float:
    """Streams one answer after the other, each to its end; the longest time between two tokens of one."""
    worst = 0.0
    while time.monotonic() < until:
        last, count = time.monotonic(), 0
        for event in server.stream([5, 6, 7], max_tokens=200, ignore_eos=True):
            worst, last = max(worst, time.monotonic() - last), time.monotonic()
            count += len(ids_of(event["choices"][0]["text"]))
        assert count == 200
    return worst


@contextmanager
def watched(server: Server) -> Iterator[list[Future[float]]]:
    """Streams that run meanwhile; their longest gaps, known when this is left."""
    with ThreadPoolExecutor(STREAMS) as clients:
        until = time.monotonic() + WATCH_SECONDS
        yield [clients.submit(longest_gap, server, until) for _ in range(STREAMS)]


@pytest.fixture(scope="module")
def gap_at_rest(server: Server) -> float:
    """Seconds; not of the first streams, which find the server cold."""
    for _ in range(2):
        with watched(server) as streams:
            pass
    return max(each.result() for each in streams)


@pytest.mark.parametrize("name", LARGE)
def test_a_hostile_body_gets_a_4xx_and_nobody_else_notices(server: Server, gap_at_rest: float, name: str) -> None:
    path, body = LARGE[name]
    with watched(server) as streams:
        time.sleep(0.5)
        whole = body()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(whole))}
        # In parts: of one large part httpx copies all that is left whenever some of it was taken, which stalls streams.
        parts = (whole[at : at + PART_BYTES] for at in range(0, len(whole), PART_BYTES))
        refused = httpx.post(server.base_url + path, content=parts, headers=headers, timeout=60)
    assert 400 <= refused.status_code < 500, refused.text[:300]
    assert len(refused.text) < MAX_REFUSAL_CHARACTERS
    assert max(each.result() for each in streams) < gap_at_rest + LONGEST_STALL_SECONDS, name
    assert server.get("/readyz").status_code == 200
