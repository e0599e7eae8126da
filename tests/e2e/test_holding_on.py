"""A real server among clients that hold on and clients that ask for much: it answers others, quietly."""

from __future__ import annotations

import resource
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from moe_serve.cli.random_model import make_model
from tests.support.server import Server, serving

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]

NUM_IDLE = 1200
OPEN_FILES = 1024
MAX_CONNECTIONS = 700
TIMES_ALONE = 10
LEAST_SECONDS = 0.5
"""Below this a measurement on a busy machine says nothing."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_model(folder=folder, preset="tiny", arch="qwen3_moe", seed=0)
    with serving(str(folder), "--dtype", "float32", "--max-connections", str(MAX_CONNECTIONS)) as running:
        yield running


def short(server: Server) -> float:
    began = time.monotonic()
    server.complete("In the beginning", max_tokens=8, ignore_eos=True)
    return time.monotonic() - began


BIG: dict[str, dict[str, object]] = {
    "many prompts": {"prompt": [f"In the beginning {number}" for number in range(1024)], "max_tokens": 16},
    "scored prompts": {
        "prompt": [[3 + (number * 7 + place) % 90 for place in range(120)] for number in range(200)],
        "max_tokens": 1,
        "echo": True,
        "logprobs": 20,
    },
    "many choices": {"prompt": "In the beginning", "n": 128, "max_tokens": 100, "temperature": 1.0},
    "long prompts": {"prompt": [[3 + (number + place) % 90 for place in range(120)] for number in range(500)]},
}


@pytest.mark.parametrize("name", BIG)
def test_a_short_request_is_answered_beside_a_large_one_within_ten_times_its_time_alone(
    server: Server, name: str
) -> None:
    short(server)
    alone = statistics.median(short(server) for _ in range(5))
    body = {"temperature": 0.0, "ignore_eos": True} | BIG[name]
    answers: list[httpx.Response] = []
    large = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", body)))
    large.start()
    time.sleep(0.2)
    beside = []
    while large.is_alive() and len(beside) < 7:
        beside.append(short(server))
    large.join()
    assert answers[0].status_code == 200
    assert statistics.median(beside) <= max(TIMES_ALONE * alone, LEAST_SECONDS), (alone, beside)


def test_more_idle_connections_than_files_may_be_open_leave_the_server_healthy_and_quiet(server: Server) -> None:
    api = server.member("api.server")
    assert len(set(resource.prlimit(api.pid, resource.RLIMIT_NOFILE))) == 1, "the soft limit is the hard one"
    resource.prlimit(api.pid, resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    before, logged = api.num_fds(), len(server.log())
    host, port = server.base_url.removeprefix("http://").split(":")
    with many_files(), ExitStack() as stack:
        for _ in range(NUM_IDLE):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
        deadline = time.monotonic() + 8
        while server.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline, "those over the limit are never sent away"
            time.sleep(0.1)
        used = sum(api.cpu_times()[:2])
        assert [server.get("/readyz").status_code for _ in range(5)] == [200] * 5
        assert server.get("/v1/models").status_code == 503
        time.sleep(2)
        assert sum(api.cpu_times()[:2]) - used < 1, "it does not spin"
        assert MAX_CONNECTIONS < api.num_fds() < OPEN_FILES
        assert len(server.log()) - logged < 20_000
    short(server)
    deadline = time.monotonic() + 5
    while api.num_fds() > before + 5:
        assert time.monotonic() < deadline, "descriptors are left"
        time.sleep(0.05)


@contextmanager
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
