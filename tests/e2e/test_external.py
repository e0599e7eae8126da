"""Ranks that are started apart, each with a server of its own: they meet, answer alike, end together and come back."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from moe_serve.base.secret import TOKEN_ENVIRONMENT
from moe_serve.cli.random_model import make_model
from moe_serve.launch.endings import WORLD_ENDED
from tests.support.load import Load
from tests.support.server import COMMAND, Server

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

OPTIONS = ("-ep", "--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", str(16 * 2**20))
PROMPTS = ["In the beginning", "def main():", "once"]
NAMED_SECONDS = 10.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model") / "tiny"))


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


class World:
    """Ranks by number, of one token and one meeting place."""

    def __init__(self, model: str, size: int, *options: str) -> None:
        self.token = secrets.token_hex(16)
        self.ranks: dict[int, Server] = {}
        self._started: list[Server] = []
        meeting = ("-dp", str(size), "--data-parallel-address", "127.0.0.1", "-dpp", free_port())
        self._common = (model, *meeting, *OPTIONS, *options)

    def start(self, rank: int, *options: str, token: str | None = None) -> Server:
        server = Server(*self._common, "--data-parallel-rank", str(rank), *options, token=token or self.token)
        self.ranks[rank] = server
        self._started.append(server)
        return server

    def start_beside(self, rank: int, *options: str) -> Server:
        """One that is not counted among the world's."""
        known = dict(self.ranks)
        server = self.start(rank, *options)
        self.ranks = known
        return server

    def wait_ready(self) -> None:
        for server in self.ranks.values():
            server.wait_ready()

    def close(self) -> None:
        for server in self._started:
            server.end()


@contextmanager
def world_of(model: str, *ranks: int, options: tuple[str, ...] = ()) -> Iterator[World]:
    """Ranks, started in this order."""
    with ExitStack() as stack:
        world = World(model, len(ranks), *options)
        stack.callback(world.close)
        for rank in ranks:
            world.start(rank)
        world.wait_ready()
        yield world


def answers(server: Server) -> list[str]:
    return [server.complete(prompt, max_tokens=24, ignore_eos=True)["choices"][0]["text"] for prompt in PROMPTS]


@pytest.mark.long
def test_ranks_started_in_any_order_meet_and_answer_alike_each_under_its_own_name(model: str) -> None:
    with world_of(model, 1, 0) as world:
        given = {rank: answers(server) for rank, server in world.ranks.items()}
        assert given[0] == given[1]
        for rank, server in world.ranks.items():
            answer = server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
            assert answer.headers["X-Data-Parallel-Rank"] == str(rank)
            elsewhere = {"X-Data-Parallel-Rank": str(1 - rank)}
            assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, elsewhere).status_code == 400
            assert server.get("/readyz").status_code == 200
            assert "world 1 is ready" in server.log()


@pytest.mark.long
def test_when_a_rank_dies_the_others_say_so_end_their_streams_and_exit_with_their_own_code(model: str) -> None:
    with world_of(model, 0, 1) as world:
        load = Load(world.ranks[1], count=2).start()
        world.ranks[0].member("engine.process", dp=0).kill()
        died = time.monotonic()
        while is_ready(world.ranks[1]) and time.monotonic() < died + NAMED_SECONDS:
            time.sleep(0.05)
        assert time.monotonic() - died < NAMED_SECONDS
        assert world.ranks[1].process.wait(NAMED_SECONDS) == WORLD_ENDED
        assert world.ranks[0].process.wait(NAMED_SECONDS) == 1
        assert not load.wait_ended(2)
        assert all("engine dp 0" in (stream.error or {}).get("message", "") for stream in load.streams)
        assert not world.ranks[1].wait_gone(2)


def is_ready(server: Server) -> bool:
    try:
        return server.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.long
def test_a_world_comes_back_when_the_rank_that_died_is_started_again(model: str) -> None:
    with world_of(model, 0, 1, options=("--restart-world",)) as world:
        before = answers(world.ranks[0])
        for dead in (1, 0):
            world.ranks[dead].process.kill()
            world.ranks[dead].process.wait()
            world.start(dead)
            world.ranks[dead].wait_ready()
            other = world.ranks[1 - dead]
            until_ready_again(other, 2 if dead == 1 else 3)
            assert answers(other) == answers(world.ranks[dead]) == before


@pytest.mark.long
def test_a_launcher_that_is_asked_to_stop_between_two_worlds_stops(model: str) -> None:
    with world_of(model, 0, 1, options=("--restart-world",)) as world:
        world.ranks[1].process.kill()
        deadline = time.monotonic() + 30
        while "starting this node's part of the next world" not in world.ranks[0].log():
            assert time.monotonic() < deadline, world.ranks[0].log()
            time.sleep(0.02)
        assert world.ranks[0].terminate() == 0


def until_ready_again(server: Server, number: int) -> None:
    """Its launcher goes on, with a new API server on another port: the curl line of that world counts."""
    deadline = time.monotonic() + 60
    told = re.compile(rf"world {number} is ready$.*?^curl (http://[^/\s]+)/", re.MULTILINE | re.DOTALL)
    while (found := told.search(server.log())) is None:
        assert time.monotonic() < deadline, server.log()
        assert server.process.poll() is None, server.log()
        time.sleep(0.05)
    server.base_url = found.group(1)


@pytest.mark.long
def test_a_rank_that_is_asked_to_stop_finishes_what_it_has_and_steps_on_until_nobody_has_work(model: str) -> None:
    with world_of(model, 0, 1, options=("--shutdown-timeout", "60")) as world:
        leaving, staying = world.ranks[1], world.ranks[0]
        short, long = Load(leaving, count=1, max_tokens=60).start(), Load(staying, count=1, max_tokens=400).start()
        leaving.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while is_ready(leaving) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not is_ready(leaving)
        assert is_ready(staying)
        for load, length in ((short, 60), (long, 400)):
            assert not load.wait_ended(60)
            assert [stream.finish_reason for stream in load.streams] == ["length"], length
        assert leaving.process.wait(20) == 0, leaving.log()
        assert staying.process.wait(20) == WORLD_ENDED, staying.log()


REFUSED = {
    "another token": ((), "another world", secrets.token_hex(16)),
    "other options": (("--block-size", "32"), "block_size: 32, not 16", None),
    "rank 0 again": (("--data-parallel-rank", "0"), "the coordinator cannot listen on", None),
}


@pytest.fixture(scope="module")
def waiting(model: str) -> Iterator[World]:
    """Rank 0 of two, which waits for rank 1."""
    world = World(model, 2)
    server = world.start(0)
    deadline = time.monotonic() + 60
    while not listens(world) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.process.poll() is None, server.log()
    yield world
    world.close()


def listens(world: World) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port_of(world)), timeout=1):
        return True
    return False


def port_of(world: World) -> int:
    return int(world._common[world._common.index("-dpp") + 1])


@pytest.mark.long
@pytest.mark.parametrize("name", REFUSED)
def test_who_does_not_belong_is_refused_by_name_and_the_others_wait_on(waiting: World, name: str) -> None:
    options, sentence, token = REFUSED[name]
    stranger = waiting.start(1, *options, token=token)
    assert stranger.process.wait(60) == 2, stranger.log()
    assert sentence in stranger.log()
    assert "Traceback" not in stranger.log()
    assert waiting.ranks[0].process.poll() is None


@pytest.mark.long
def test_a_rank_0_that_never_comes_is_waited_for_no_longer_than_asked(model: str) -> None:
    world = World(model, 2)
    begun = time.monotonic()
    rank = world.start(1, "--start-timeout-seconds", "4")
    try:
        assert rank.process.wait(30) == 2
        assert time.monotonic() - begun < 20
        assert "rank 1 could not join rank 0 at 127.0.0.1:" in rank.log()
        assert "--data-parallel-address" in rank.log()
    finally:
        world.close()


BAD = {
    "a rank beyond": (
        ("-dp", "3", "--data-parallel-rank", "2"),
        "rank 2 .* must start DP ranks in .0, 2., not .2.; rank 0 was started with --data-parallel-size 2",
    ),
    "other sizes": (("-dp", "3", "--data-parallel-rank", "1"), "rank 1 .* data_parallel_size: 3, not 2"),
    "other tensor parallel size": (("-tp", "2"), "rank 1 .* tensor_parallel_size: 2, not 1"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", BAD)
def test_a_rank_of_another_size_is_refused_by_name_and_the_others_wait_on(waiting: World, name: str) -> None:
    options, sentence = BAD[name]
    stranger = waiting.start_beside(1, *options)
    assert stranger.process.wait(30) == 2, stranger.log()
    assert re.search(sentence, stranger.log()), stranger.log()
    assert "Traceback" not in stranger.log()
    assert waiting.ranks[0].process.poll() is None


@pytest.mark.long
def test_of_two_processes_with_the_same_rank_one_is_refused(model: str) -> None:
    world = World(model, 3)
    try:
        first, twins = world.start(0), [world.start(1), world.start(1)]
        deadline = time.monotonic() + 60
        while not (refused := [twin for twin in twins if twin.process.poll() is not None]):
            assert time.monotonic() < deadline, twins[0].log()
            time.sleep(0.1)
        assert [twin.process.poll() for twin in refused] == [2]
        assert re.search("launcher of rank 1 .* is here already .*--data-parallel-rank", refused[0].log())
        assert "--data-parallel-address" not in refused[0].log()
        assert first.process.poll() is None, first.log()
    finally:
        world.close()


@pytest.mark.long
def test_a_rank_1_that_never_comes_is_named_with_where_it_should_have_come(model: str) -> None:
    world = World(model, 2)
    rank = world.start(0, "--start-timeout-seconds", "6")
    try:
        assert rank.process.wait(30) == 1
        assert f"missing: rank 1 at 127.0.0.1:{port_of(world)}" in rank.log()
        assert not rank.wait_gone(2)
    finally:
        world.close()


@pytest.mark.long
def test_another_service_at_the_meeting_place_is_told_from_nobody_there(model: str) -> None:
    world = World(model, 2)
    with socket.create_server(("127.0.0.1", port_of(world))):
        rank = world.start(1, "--start-timeout-seconds", "6")
        try:
            assert rank.process.wait(40) == 2
            assert "who listens there does not answer as a coordinator does" in rank.log()
        finally:
            world.close()


@pytest.mark.long
def test_a_name_that_never_resolves_is_waited_for_no_longer_than_asked(model: str) -> None:
    world = World(model, 2)
    rank = world.start_beside(1, "--data-parallel-address", "no.such.host.invalid", "--start-timeout-seconds", "2")
    try:
        assert rank.process.wait(30) == 2
        assert re.search(
            r"'no\.such\.host\.invalid' cannot be resolved: .* for 2 s .*--data-parallel-address", rank.log()
        )
    finally:
        world.close()


@pytest.mark.long
def test_one_nodes_mistake_is_its_own_exit_code_and_the_others_wait_until_it_is_mended(model: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = str(held.getsockname()[1])
        world = World(model, 2)
        try:
            well, ill = world.start(0), world.start(1, "--port", port)
            assert ill.process.wait(60) == 2
            assert f"the HTTP server cannot listen on 127.0.0.1:{port}" in ill.log()
            mended = world.start(1)
            mended.wait_ready()
            well.wait_ready()
        finally:
            world.close()


def test_ranks_apart_need_a_secret(model: str, tmp_path: Path) -> None:
    for options, sentence in (
        ((), "openssl rand -hex 16"),
        (("--world-token-file", str(tmp_path / "none")), "--world-token-file .* cannot be read"),
    ):
        told = [*COMMAND, "serve", model, "-dp", "2", "--data-parallel-rank", "1", *options]
        environment = {name: value for name, value in os.environ.items() if name != TOKEN_ENVIRONMENT}
        done = subprocess.run(told, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2
        assert re.search(sentence, done.stderr), done.stderr


NODES = {
    "hybrid": (
        ("--data-parallel-hybrid-lb", "--data-parallel-size-local", "1"),
        ("--data-parallel-hybrid-lb", "--data-parallel-size-local", "1", "--data-parallel-start-rank", "1"),
    ),
    "headless": (
        ("--data-parallel-size-local", "1"),
        ("--headless", "--data-parallel-size-local", "1", "--data-parallel-start-rank", "1"),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("kind", NODES)
def test_two_nodes_form_one_world_whose_servers_serve_the_ranks_they_should(model: str, kind: str) -> None:
    world = World(model, 2)
    try:
        head, other = (Server(*world._common, *options, token=world.token) for options in NODES[kind])
        world._started += [head, other]
        head.wait_ready()
        served = [rank for rank in (0, 1) if status(head, rank) == 200]
        if kind == "hybrid":
            other.wait_ready()
            assert served == [0]
            assert [rank for rank in (0, 1) if status(other, rank) == 200] == [1]
            assert answers(head) == answers(other)
        else:
            assert served == [0, 1]
            assert "curl" not in other.log()
        assert head.terminate() == 0
        assert other.process.wait(20) == WORLD_ENDED, other.log()
    finally:
        world.close()


def status(server: Server, rank: int) -> int:
    body = {"prompt": "x", "max_tokens": 1}
    return server.post("/v1/completions", body, {"X-Data-Parallel-Rank": str(rank)}).status_code
