"""Several ports on one node: one command, a server for each rank, and a supervisor that speaks for all of them."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import psutil
import pytest

from moe_serve.base.secret import TOKEN_ENVIRONMENT
from moe_serve.cli.random_model import make_model
from moe_serve.launch.endings import WORLD_ENDED
from tests.support.load import Load
from tests.support.server import COMMAND
from tests.support.supervised import SupervisedNode, free_ports, is_free

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

OPTIONS = ("-ep", "--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", str(16 * 2**20))
NAMED_SECONDS = 10.0
PROBE_SECONDS = 5.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model") / "tiny"))


@contextmanager
def alone(model: str, *options: str) -> Iterator[SupervisedNode]:
    """One node with both ranks of a world."""
    node = SupervisedNode(model, "-dp", "2", "-dpp", str(free_ports(1)), *OPTIONS, *options, num_ranks=2)
    try:
        yield node.wait_ready()
    finally:
        node.end()


@contextmanager
def two_nodes(model: str, *options: str) -> Iterator[tuple[SupervisedNode, SupervisedNode]]:
    """Ranks 0 and 1 on one, rank 2 on the other, which is started first."""
    meeting = ("-dp", "3", "--data-parallel-address", "127.0.0.1", "-dpp", str(free_ports(1)))
    common, token = (model, *meeting, *OPTIONS, *options), secrets.token_hex(16)
    with ExitStack() as stack:
        other = SupervisedNode(*common, "-dpr", "2", "-dpl", "1", num_ranks=1, token=token)
        stack.callback(other.end)
        head = SupervisedNode(*common, "-dpl", "2", num_ranks=2, token=token)
        stack.callback(head.end)
        yield head.wait_ready(), other.wait_ready()


def text_of(node: SupervisedNode, place: int) -> str:
    return str(node.use(place).complete("In the beginning", max_tokens=24, ignore_eos=True)["choices"][0]["text"])


@pytest.mark.long
def test_each_rank_answers_at_its_own_port_and_the_supervisor_for_all(model: str) -> None:
    with alone(model) as node:
        assert text_of(node, 0) == text_of(node, 1)
        told = node.ranks()
        assert [(each["rank"], each["port"], each["ready"]) for each in told] == [
            (0, node.port, True),
            (1, node.port + 1, True),
        ]
        for place, each in enumerate(told):
            node.use(place)
            answer = node.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
            assert answer.headers["X-Data-Parallel-Rank"] == str(place)
            elsewhere = {"X-Data-Parallel-Rank": str(1 - place)}
            assert node.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, elsewhere).status_code == 400
            assert f'engine="{place}"' in node.get("/metrics").text
            assert f'engine="{1 - place}"' not in node.get("/metrics").text
            assert psutil.Process(each["pid"]).ppid() == node.process.pid
            local = node.member("engine.process", dp=place).environ()["MOE_SERVE_MEMBER"]
            assert f'"local_rank":{place}' in local
            assert '"ranks_here":2' in local
        for path, status in (("/livez", 200), ("/health", 200), ("/version", 200), ("/v1/models", 404)):
            answer_of_supervisor = node.ask(path)
            assert answer_of_supervisor is not None
            assert answer_of_supervisor.status_code == status

        stopped = node.member("api.server").pid
        listening = {each.laddr.port: each.pid for each in psutil.net_connections("tcp") if each.status == "LISTEN"}
        place = 0 if listening[node.port] == stopped else 1
        os.kill(stopped, signal.SIGSTOP)
        try:
            reason = node.wait_red(PROBE_SECONDS)
        finally:
            os.kill(stopped, signal.SIGCONT)
        assert reason.startswith(f"rank {place} (port {node.port + place}): does not answer at 127.0.0.1")
        node.wait_ready(PROBE_SECONDS)

        os.kill(node.process.pid, signal.SIGKILL)
        node.process.wait()
        assert not node.wait_gone(NAMED_SECONDS), "who was started by a supervisor ends with it"
        assert all(is_free(node.port + place) for place in range(3))


@pytest.mark.long
def test_sigterm_drains_all_ranks(model: str) -> None:
    with alone(model, "--shutdown-timeout", "60") as node:
        loads = []
        for place in (0, 1):
            loads.append(Load(node.use(place), count=1, max_tokens=200 * (place + 1)).start())
        node.process.send_signal(signal.SIGTERM)
        assert node.wait_red(2.0) == "this node is shutting down"
        for load in loads:
            assert not load.wait_ended(60)
            assert [stream.finish_reason for stream in load.streams] == ["length"], node.log()
        assert node.process.wait(20) == 0, node.log()
        assert not node.wait_gone(2)


@pytest.mark.long
def test_a_second_signal_ends_all_ranks_at_once(model: str) -> None:
    with alone(model, "--shutdown-timeout", "60") as node:
        Load(node, count=1).start()
        node.process.send_signal(signal.SIGTERM)
        node.wait_red(2.0)
        node.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        assert node.process.wait(10) == 128 + signal.SIGTERM
        assert time.monotonic() - begun < 5
        assert not node.wait_gone(5)


@pytest.mark.long
def test_when_a_rank_dies_its_node_exits_with_1_and_the_others_with_3(model: str) -> None:
    with two_nodes(model) as (head, other):
        assert text_of(head, 0) == text_of(head, 1) == text_of(other, 0)
        load = Load(head.use(1), count=1).start()
        other.member("engine.process", dp=2).kill()
        head.wait_red(NAMED_SECONDS)
        assert not load.wait_ended(NAMED_SECONDS)
        assert "engine dp 2" in (load.streams[0].error or {}).get("message", "")
        assert head.process.wait(20) == WORLD_ENDED, head.log()
        assert other.process.wait(20) == 1, other.log()
        assert not head.wait_gone(2)


@pytest.mark.long
def test_a_node_that_is_asked_to_stop_exits_with_0_and_the_other_with_3(model: str) -> None:
    with two_nodes(model) as (head, other):
        load = Load(head, count=1, max_tokens=200).start()
        assert head.terminate() == 0, head.log()
        assert [stream.finish_reason for stream in load.streams] == ["length"]
        assert other.process.wait(20) == WORLD_ENDED, other.log()


@pytest.mark.long
def test_a_world_whose_ranks_died_comes_back_on_its_nodes_at_the_same_ports(model: str) -> None:
    with two_nodes(model, "--restart-world") as (head, other):
        before, first = text_of(head, 0), head.ranks()
        for is_launcher in (False, True):
            launcher = psutil.Process(head.ranks()[0]["pid"])
            (launcher if is_launcher else head.member("engine.process", dp=1)).kill()
            head.wait_red(NAMED_SECONDS)
            for node in (head, other):
                node.wait_red(NAMED_SECONDS)
            for node in (head, other):
                node.wait_ready()
            assert text_of(head, 0) == text_of(head, 1) == text_of(other, 0) == before
        assert [(each["rank"], each["port"]) for each in head.ranks()] == [
            (each["rank"], each["port"]) for each in first
        ]
        assert {each["pid"] for each in head.ranks()}.isdisjoint({each["pid"] for each in first})


REFUSED = {
    "a port of the range": ((), 1, r"HTTP of rank 1, at 127.0.0.1:\d+: .*in use \(--port\)"),
    "the supervisor's port": ((), 2, r"supervisor, at .*in use \(--data-parallel-supervisor-port\)"),
    "the coordinator's among them": (("-dpp", "{0}"), None, r"coordinator .* and HTTP of rank 0 .* would both listen"),
    "a world of more ranks without a secret": (("-dp", "3", "-dpl", "2"), None, "openssl rand -hex 16"),
}


@pytest.mark.parametrize(
    "name", [name if not number else pytest.param(name, marks=pytest.mark.long) for number, name in enumerate(REFUSED)]
)
def test_what_cannot_be_is_one_sentence_before_anything_is_started(model: str, name: str) -> None:
    options, taken, sentence = REFUSED[name]
    first = free_ports(3)
    ports = ("--port", str(first), "--data-parallel-supervisor-port", str(first + 2))
    options = tuple(option.format(first) for option in options)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0 if taken is None else first + taken))
        holder.listen()
        environment = {name: value for name, value in os.environ.items() if name != TOKEN_ENVIRONMENT}
        told = [*COMMAND, "serve", model, "-dp", "2", "-dpm", *ports, *options]
        done = subprocess.run(told, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert re.search(sentence, done.stderr), done.stderr
    assert "launcher dp" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_rank_that_is_refused_ends_its_node_with_2(model: str) -> None:
    """The coordinator's port is another service's: no rank can tell before it has tried."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        node = SupervisedNode(model, "-dp", "2", "-dpp", str(port), *OPTIONS, num_ranks=2)
        try:
            assert node.process.wait(60) == 2, node.log()
            assert "the coordinator cannot listen on" in node.log()
            assert "Traceback" not in node.log()
            assert not node.wait_gone(2)
        finally:
            node.end()
