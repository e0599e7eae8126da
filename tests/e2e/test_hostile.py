"""One request cannot end or stall the others, whatever it holds. A real server with two engines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.bad_requests import LARGE, MAX_REFUSAL_CHARACTERS
from tests.support.letters import ids_of, write_letters
from tests.support.server import Server, serving
from tests.support.tiny_model import tiny_model

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]

STREAMS = 8
LONGEST_GAP_SECONDS = 1.0


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


@pytest.mark.parametrize("name", LARGE)
def test_a_hostile_body_gets_a_4xx_and_nobody_else_notices(server: Server, name: str) -> None:
    path, body = LARGE[name]
    with ThreadPoolExecutor(STREAMS) as clients:
        until = time.monotonic() + 3
        watching = [clients.submit(longest_gap, server, until) for _ in range(STREAMS)]
        time.sleep(0.5)
        headers = {"Content-Type": "application/json"}
        refused = httpx.post(server.base_url + path, content=body(), headers=headers, timeout=60)
        gaps = [each.result() for each in watching]
    assert 400 <= refused.status_code < 500, refused.text[:300]
    assert len(refused.text) < MAX_REFUSAL_CHARACTERS
    assert max(gaps) < LONGEST_GAP_SECONDS, name
    assert server.get("/readyz").status_code == 200
