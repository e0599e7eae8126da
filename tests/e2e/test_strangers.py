"""Whoever can reach the world's ports and does not know its token ends, stalls and learns nothing. A real world."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.letters import ids_of, write_letters
from tests.support.server import Server, serving
from tests.support.strangers import knock, listening_ports
from tests.support.tiny_model import tiny_model

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]

ATTACK_SECONDS = 20.0
STREAMS = 4
TOKENS = 24
MAX_GROWTH_BYTES = 40 << 20
"""Of the whole family, while everything is knocked at: heaps breathe."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny_model(made, "qwen3_moe", seed=5)
    write_letters(made, 131)
    return made


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serving(str(folder), "--dtype", "float32", "-dp", "2", "-tp", "2", "-ep") as running:
        yield running


def inner_ports(server: Server) -> list[int]:
    """Every port of this world but the HTTP server's."""
    http = int(server.base_url.rpartition(":")[2])
    return [port for port in listening_ports(server.family()) if port != http]


def answer(server: Server, prompt: list[int]) -> list[int]:
    return [token for event in server.stream(prompt, max_tokens=TOKENS, ignore_eos=True) for token in tokens_of(event)]


def tokens_of(event: dict[str, object]) -> list[int]:
    choices = event["choices"]
    assert isinstance(choices, list)
    return ids_of(choices[0]["text"])


def footprint(server: Server) -> tuple[int, int]:
    """Memory and descriptors of all processes."""
    family = server.family()
    return sum(each.memory_info().rss for each in family), sum(each.num_fds() for each in family)


def test_garbage_on_every_port_changes_no_answer_ends_no_stream_and_costs_nothing(server: Server) -> None:
    prompts = [[5 + number, 6, 7] for number in range(STREAMS)]
    expected = [answer(server, prompt) for prompt in prompts]
    memory, descriptors = footprint(server)
    until = time.monotonic() + ATTACK_SECONDS
    doors, stop = inner_ports(server), threading.Event()
    with ThreadPoolExecutor(len(doors)) as strangers, ThreadPoolExecutor(STREAMS) as clients:
        knocking = [strangers.submit(knock, port, stop) for port in doors]
        try:
            while time.monotonic() < until:
                assert list(clients.map(lambda prompt: answer(server, prompt), prompts)) == expected
        finally:
            stop.set()
    # The coordinator's, the API server's and each engine's two for its workers; the store's and gloo's are deaf.
    assert sum(each.result() > 0 for each in knocking) == 1 + 1 + 2 * 2 < len(doors)
    time.sleep(1)  # what was held on to is let go
    assert server.get("/readyz").status_code == 200, server.log()
    assert server.token not in server.log()
    assert server.token not in server.get("/config").text
    now_memory, now_descriptors = footprint(server)
    assert now_descriptors <= descriptors + 8
    assert now_memory - memory < MAX_GROWTH_BYTES
    assert len(server.log()) < 50_000, "lines that strangers cause are few"


@contextlib.contextmanager
def starting(folder: Path) -> Iterator[Server]:
    server = Server(str(folder), "--dtype", "float32", "-dp", "2", "-ep")
    try:
        yield server
    finally:
        server.end()


def test_a_crowd_that_says_nothing_keeps_no_member_out(folder: Path) -> None:
    """Silent connections to the coordinator, from its first moment on: the world gets ready all the same."""
    stop = threading.Event()
    with starting(folder) as server:
        crowd = threading.Thread(target=_crowd, args=(server, stop))
        crowd.start()
        try:
            server.wait_ready()
        finally:
            stop.set()
            crowd.join()
        assert server.complete([5, 6, 7], max_tokens=2)["usage"]["completion_tokens"] == 2


def _crowd(server: Server, stop: threading.Event) -> None:
    held: list[socket.socket] = []
    while not stop.is_set():
        for port in listening_ports(server.family()):
            for _ in range(10):
                with contextlib.suppress(OSError):
                    held.append(socket.create_connection(("127.0.0.1", port), timeout=0.1))
        while len(held) > 300:
            held.pop(0).close()
        time.sleep(0.05)
    for each in held:
        each.close()
