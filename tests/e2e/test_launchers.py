"""Several launchers and several front-ends of one world, on one machine: they know an address and a token."""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from moe_serve.base.config import Config
from moe_serve.base.messages import Stop
from moe_serve.cli.random_model import make_model
from moe_serve.launch.node import Node
from moe_serve.launch.part import NodePart
from moe_serve.launch.resolve import resolve
from moe_serve.world.member import ENVIRONMENT, MemberSpec, started
from tests.support import second_launcher
from tests.support import watched as watched_executor

pytestmark = [pytest.mark.ranks, pytest.mark.long]

READY_SECONDS = 60.0
END_SECONDS = 15.0
LAYERS, NUM_REDUNDANT = 4, 4
BODY = {"prompt": "together", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


class FirstLauncher:
    """A Node in a thread of its own: it holds the coordinator and starts engine 0 and an API server."""

    def __init__(self, config: Config) -> None:
        self.token = secrets.token_hex(16)
        self.node = Node(config, NodePart(dp_ranks=(0,)), token=self.token)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.call(self.node.start())

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(READY_SECONDS)

    def end(self, stop: Stop) -> None:
        self._loop.call_soon_threadsafe(self.node.end, stop)

    def close(self) -> None:
        self.call(self.node.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(END_SECONDS)
        self._loop.close()


def config_for(folder: Path, joins: Node | None = None) -> Config:
    options = {"model": str(folder), "data_parallel_size": 3, "enable_expert_parallel": True, "max_model_len": 256}
    still = {"num_redundant_experts": NUM_REDUNDANT, "policy": "static", "step_interval": 10**9}
    options |= {"enable_eplb": True, "eplb_config": still, "dtype": "float32"}
    options |= {"distributed_executor_backend": "tests.support.watched:WatchedExecutor"}
    small = {"kv_cache_memory_bytes": 2**24, "port": 0, "served_model_name": "tiny"}
    meeting = {} if joins is None else {"data_parallel_address": joins.host, "data_parallel_rpc_port": joins.port}
    return resolve(Config.from_flat({**options, **small, **meeting}))[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two copies of one model, as on two machines."""
    first = make_model(tmp_path_factory.mktemp("first") / "tiny")
    return [first, Path(shutil.copytree(first, tmp_path_factory.mktemp("second") / "elsewhere"))]


def complete(address: str, rank: int) -> httpx.Response:
    headers = {"X-data-parallel-rank": str(rank)}
    return httpx.post(f"http://{address}/v1/completions", json=BODY, headers=headers, timeout=30)


def find_member(token: str, module: str, **told: object) -> psutil.Process:
    """The process of this world that runs `module` and was told so, once there is one."""

    def matches(spec: MemberSpec) -> bool:
        return spec.token == token and all(getattr(spec, name) == value for name, value in told.items())

    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        for pid in started(matches):
            process = psutil.Process(pid)
            if f"moe_serve.{module}" in process.cmdline():
                return process
        time.sleep(0.05)
    raise AssertionError(f"no {module} was told {told}")


def node_of(member: psutil.Process) -> str:
    return msgspec.json.decode(member.environ()[ENVIRONMENT], type=MemberSpec).site.node


def wait_for_address(process: psutil.Process) -> str:
    """Where the process listens for HTTP, once it says it can serve."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        for connection in process.net_connections("tcp4"):
            address = f"{connection.laddr[0]}:{connection.laddr[1]}"
            if connection.status == psutil.CONN_LISTEN and says_ready(address):
                return address
        time.sleep(0.05)
    raise AssertionError("it does not serve")


def says_ready(address: str) -> bool:
    try:
        return httpx.get(f"http://{address}/readyz", timeout=1).status_code == 200
    except httpx.HTTPError:  # the port for engines
        return False


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the ranks write down which copies of experts they use."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("watched")
        patch.setenv(watched_executor.ENVIRONMENT, str(folder))
        yield folder


@pytest.fixture(scope="module")
def world(folders: list[Path], watched: Path) -> Iterator[tuple[FirstLauncher, str]]:
    """Of two launchers, each with its own copy of the model; and where the first one's API server listens."""
    first = FirstLauncher(config_for(folders[0]))
    part = NodePart(serve_http=False, dp_ranks=(1, 2), joins=True)
    second = second_launcher.start(config_for(folders[1], first.node), first.token, part)
    try:
        first.call(first.node.until_ready())
        assert first.node.ended is None, first.node.ended
        yield first, first.node.front_door()
    finally:
        first.end(Stop("that was all", 0))
        code = end(second)
        first.close()
    assert code == 0
    assert started(lambda spec: spec.token == first.token) == []


def end(launcher: subprocess.Popen[bytes]) -> int | None:
    try:
        return launcher.wait(END_SECONDS)
    finally:
        launcher.kill()
        launcher.wait()


def test_two_launchers_form_one_world_that_answers_on_every_rank(world: tuple[FirstLauncher, str]) -> None:
    first, address = world
    engines = [find_member(first.token, "engine.process", dp=dp) for dp in (0, 1)]
    server = find_member(first.token, "api.server", dp=-1)
    assert node_of(engines[0]) == node_of(server) != node_of(engines[1])
    answers = [complete(address, rank) for rank in (0, 1)]
    assert [answer.status_code for answer in answers] == [200, 200], [answer.text for answer in answers]
    assert answers[0].json()["choices"][0]["text"] == answers[1].json()["choices"][0]["text"]


def test_two_launchers_are_two_nodes_and_rows_stay_on_theirs_with_the_same_answers(
    world: tuple[FirstLauncher, str], watched: Path
) -> None:
    _, address = world
    before = [complete(address, rank).json()["choices"] for rank in range(3)]
    assert httpx.get(f"http://{address}/eplb", timeout=30).json()["placement"]["num_nodes"] == 2
    row = [*range(12), 0, 1, *range(12, 22), 2, 3, *range(22, 32)]
    ranks = [rank for rank in range(3) for _ in range(12)]
    wanted = {"num_ranks": 3, "num_nodes": 2, "physical_to_logical": [row] * LAYERS, "rank_of_slot": ranks}
    applied = httpx.post(f"http://{address}/eplb/apply", json={"placement": wanted}, timeout=30)
    assert applied.status_code == 202, applied.text
    chosen = [wait_for_slots(watched / f"dp-{rank}.json") for rank in range(3)]
    # Experts 0 and 1 are also on rank 1, 2 and 3 also on rank 2: these two share a node.
    others = [[slot] for slot in (*range(4, 12), *range(14, 24), *range(26, 36))]
    assert chosen[0] == [[[0], [1], [2], [3], *others]] * LAYERS
    assert chosen[1] == [[[12], [13], [24], [25], *others]] * LAYERS
    assert chosen[2] == [[[12], [13], [24], [25], *others]] * LAYERS
    assert [complete(address, rank).json()["choices"] for rank in range(3)] == before


def wait_for_slots(file: Path) -> list[list[list[int]]]:
    """What a rank has written down, once it has."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if file.exists():
            slots: list[list[list[int]]] = json.loads(file.read_text())
            return slots
        time.sleep(0.05)
    raise AssertionError(f"{file.name} was not written")


def test_a_front_end_of_one_rank_serves_it_and_may_be_killed(
    world: tuple[FirstLauncher, str], folders: list[Path]
) -> None:
    first, address = world
    part = NodePart(dp_ranks=(), joins=True, serves=[1])
    launcher = second_launcher.start(config_for(folders[1], first.node), first.token, part)
    try:
        front_end = find_member(first.token, "api.server", serves=[1])
        own = wait_for_address(front_end)
        assert complete(own, 1).status_code == 200
        refused = complete(own, 0)
        assert refused.status_code == 400
        assert "must be one of 1, the data-parallel ranks that this front-end serves, not 0" in refused.text
        front_end.kill()
        assert launcher.wait(END_SECONDS) == 1
        assert [complete(address, rank).status_code for rank in (0, 1)] == [200, 200]
        assert first.node.ended is None
    finally:
        launcher.kill()
        launcher.wait()
