"""Clients that hold on: too many connections, slow heads, slow bodies, unfinished bodies, idle connections."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from moe_serve.api.connections import (
    ACCEPTED_AT_A_TIME,
    OTHER_DESCRIPTORS,
    OVERFLOW,
    most_connections,
)
from moe_serve.base.descriptors import raise_descriptor_limit
from moe_serve.base.errors import ConfigError
from tests.support.http_server import make_state, serving

PATIENCE = 10.0
HEAD = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@contextmanager
def server(folder: Path, **options: object) -> Iterator[str]:
    with serving(make_state(folder, **options)) as url:  # type: ignore[arg-type]
        yield url


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=PATIENCE)
    return made


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes; however it does."""
    got = b""
    try:
        while part := connection.recv(65536):
            got += part
    except ConnectionResetError:
        pass
    return got


def seconds_until_closed(connection: socket.socket) -> tuple[float, bytes]:
    began = time.monotonic()
    got = read_all(connection)
    return time.monotonic() - began, got


def metric(url: str, name: str) -> float:
    line = next(line for line in httpx.get(url + "/metrics").text.splitlines() if name in line and line[0] != "#")
    return float(line.rsplit(" ", 1)[1])


def test_beyond_the_limit_of_connections_probes_are_answered_and_all_else_is_503(model_folder: Path) -> None:
    with server(model_folder, max_connections=3) as url, ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(connect(url))
        time.sleep(0.1)
        assert httpx.get(url + "/readyz").status_code == 200
        busy = httpx.post(url + "/tokenize", json={"prompt": "x"})
        assert busy.status_code == 503
        assert busy.headers["Retry-After"]
        assert "--max-connections" in busy.json()["error"]["message"]
        assert metric(url, 'reason="connections"') == 1
        idle = stack.enter_context(connect(url))
        took, got = seconds_until_closed(idle)
        assert got.startswith(b"HTTP/1.1 503")
        assert took < 5


def test_far_beyond_the_limit_connections_are_closed_and_those_within_it_still_serve(model_folder: Path) -> None:
    with server(model_folder, max_connections=2) as url, ExitStack() as stack:
        client = stack.enter_context(httpx.Client())
        assert client.get(url + "/livez").status_code == 200
        held = [stack.enter_context(connect(url)) for _ in range(OVERFLOW + 40)]
        assert client.get(url + "/v1/models").status_code == 200
        assert all(read_all(each).startswith(b"HTTP/1.1 503") for each in held[1:])
        assert metric(url, "http_connections") <= 4, "nothing is left of them"


def test_a_slow_head_is_ended_and_its_bytes_do_not_win_it_time(model_folder: Path) -> None:
    with server(model_folder, timeout_headers=0.6) as url, connect(url) as slow:
        began = time.monotonic()
        for letter in b"GET /livez HTTP/1.1\r\nX: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa":
            try:
                slow.sendall(bytes([letter]))
            except OSError:
                break
            time.sleep(0.05)
        assert time.monotonic() - began < 3
        assert metric(url, 'reason="slow"') == 1


def test_a_connection_that_says_nothing_is_closed(model_folder: Path) -> None:
    with server(model_folder, timeout_headers=0.5) as url, connect(url) as silent:
        took, got = seconds_until_closed(silent)
        assert (got, took < 3) == (b"", True)


@pytest.mark.parametrize("drip", [False, True])
def test_a_slow_body_gets_408_and_its_bytes_do_not_win_it_time(model_folder: Path, drip: bool) -> None:
    with server(model_folder, timeout_body=0.6) as url, connect(url) as slow:
        slow.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        slow.settimeout(0.1)
        began, got = time.monotonic(), b""
        while not got and time.monotonic() - began < 5:
            if drip:
                slow.sendall(b" ")
            try:
                got = slow.recv(4096)
            except TimeoutError:
                continue
        slow.settimeout(PATIENCE)
        while b"}}" not in got:
            got += slow.recv(4096)
        assert b" 408 " in got
        assert b"--timeout-body" in got
        assert metric(url, 'reason="slow"') == 1


def test_unfinished_bodies_have_a_limit_together_and_finished_ones_do_not_count(model_folder: Path) -> None:
    options = {"max_unfinished_body_bytes": 300_000, "max_body_bytes": 250_000}
    with server(model_folder, **options) as url, connect(url) as first, connect(url) as second:
        first.sendall(HEAD + b"Content-Length: 200001\r\n\r\n" + b" " * 200_000)
        time.sleep(0.3)
        second.sendall(HEAD + b"Content-Length: 200001\r\n\r\n" + b" " * 200_000)
        assert b" 503 " in second.recv(4096)
        assert metric(url, 'reason="unfinished_bodies"') == 1
        first.close()
        until(lambda: httpx.post(url + "/tokenize", content=b'{"prompt": "x"}' + b" " * 200_000).status_code == 200)
        for _ in range(3):
            assert httpx.post(url + "/tokenize", content=b'{"prompt": "x"}' + b" " * 200_000).status_code == 200


def test_an_idle_connection_is_kept_as_long_as_the_option_says(model_folder: Path) -> None:
    with server(model_folder, timeout_keep_alive=1.5, timeout_headers=0.5) as url, connect(url) as idle:
        for pause in (0.0, 1.0):
            time.sleep(pause)
            idle.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            got = b""
            while not got.endswith(b"}"):
                got += idle.recv(4096)
        took, got = seconds_until_closed(idle)
        assert got == b""
        assert 1.0 < took < 5


def test_idle_connections_outlive_a_load_balancers_by_default(model_folder: Path) -> None:
    assert make_state(model_folder).config.server.timeout_keep_alive == 90


def test_a_long_answer_has_no_time_out(model_folder: Path) -> None:
    state = make_state(model_folder, timeout_headers=0.3, timeout_body=0.3, timeout_keep_alive=0.3)
    state.engines.seconds_per_event = 0.2  # type: ignore[attr-defined]
    with serving(state) as url:
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 8, "ignore_eos": True})
        assert answer.status_code == 200


def test_requests_in_a_row_on_one_connection_are_all_answered(model_folder: Path) -> None:
    with server(model_folder) as url, connect(url) as line:
        line.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 5)
        got = b""
        while got.count(b"HTTP/1.1 200") < 5:
            got += line.recv(4096)


def test_the_limit_of_connections_leaves_descriptors_for_the_rest() -> None:
    assert most_connections(None, 1024) == 1024 - OTHER_DESCRIPTORS - OVERFLOW - ACCEPTED_AT_A_TIME
    assert most_connections(100, 1024) == 100
    with pytest.raises(ConfigError, match=r"2000 HTTP connections need a limit of 2320 open files, not 1024 .*ulimit"):
        most_connections(2000, 1024)
    with pytest.raises(ConfigError, match="open files"):
        most_connections(None, 256)


def test_the_soft_limit_of_descriptors_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    raise_descriptor_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
