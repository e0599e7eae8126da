"""Data-parallel ranks fall asleep together, cost nothing then, and wake at once; bursts and gaps never strand one."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.letters import write_letters
from tests.support.server import Server, serving
from tests.support.tiny_model import tiny_model

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

BURSTS = 200
WATCH_SECONDS = 3.0
WATCHES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny_model(made, "qwen3_moe", seed=5)
    write_letters(made, 131)
    return made


@pytest.fixture(scope="module", params=[pytest.param(2, id="dp2"), pytest.param(4, id="dp4", marks=pytest.mark.long)])
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[Server]:
    with serving(str(folder), "--dtype", "float32", "-dp", str(request.param), "-ep") as running:
        yield running


def one_token(server: Server) -> float:
    """Seconds until a one-token answer is here."""
    started = time.perf_counter()
    server.complete([7, 8, 9], max_tokens=1)
    return time.perf_counter() - started


@pytest.mark.long
def test_random_bursts_with_gaps_strand_no_rank(server: Server) -> None:
    numbers = random.Random(17)
    with ThreadPoolExecutor(6) as pool:
        for burst in range(BURSTS):
            lengths = [numbers.randint(1, 4) for _ in range(numbers.randint(1, 6))]
            answers = pool.map(lambda n: server.complete([5, 6, 7], max_tokens=n, ignore_eos=True), lengths, timeout=20)
            counts = [answer["usage"]["completion_tokens"] for answer in answers]
            assert counts == lengths, f"burst {burst}"
            time.sleep(numbers.choice([0, 0, 0.001, 0.003, 0.01, 0.03]))


@pytest.mark.long
def test_a_sleeping_world_uses_next_to_nothing(server: Server) -> None:
    """Of a core and for each rank less than 2.5 % in the quietest of a few watches: measured were 0.6 to 2 % on
    machines of different speeds (gloo's threads look about 100 times a second). Who looked for work would take
    a core.
    """
    one_token(server)
    time.sleep(1)
    num_ranks = server.get("/config").json()["parallel"]["data_parallel_size"]
    assert any(share_of_a_core(server) < 0.025 * num_ranks for _ in range(WATCHES))


def share_of_a_core(server: Server) -> float:
    """What all processes of the server use, watched for a while."""
    family = server.family()
    started, before = time.perf_counter(), sum(sum(process.cpu_times()[:2]) for process in family)
    time.sleep(WATCH_SECONDS)
    used = sum(sum(process.cpu_times()[:2]) for process in family) - before
    return used / (time.perf_counter() - started)


@pytest.mark.long
def test_waking_costs_under_a_tenth_of_a_second(server: Server) -> None:
    asleep, awake = [], []
    for _ in range(9):
        time.sleep(0.3)
        asleep.append(one_token(server))
    with ThreadPoolExecutor(1) as pool:
        keeping_awake = pool.submit(server.complete, [5], max_tokens=480, ignore_eos=True)
        while not keeping_awake.done():
            awake.append(one_token(server))
    assert len(awake) > 3
    assert statistics.median(asleep) - statistics.median(awake) < 0.1
