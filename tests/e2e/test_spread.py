"""One engine whose workers are spread over two nodes: the same tokens, deaths by name, strangers refused by name.

The nodes are launchers with the same loopback address, or, where namespaces are permitted, each in a network of its own
with the commands of docs/deploying.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from bench.pods import Pods, why_not
from moe_serve.base.secret import TOKEN_ENVIRONMENT
from moe_serve.cli.random_model import make_model
from moe_serve.launch.endings import WORLD_ENDED
from tests.e2e.test_external import free_port, until_ready_again
from tests.e2e.test_parity import NUM_TOKENS, Checkpoint, make_checkpoint, plain_answers
from tests.support.letters import ids_of
from tests.support.pages import ROOT, blocks, commands
from tests.support.server import Server

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]

SMALL = ("--dtype", "float32", "--max-model-len", "256", "--kv-cache-memory-bytes", str(2**24))
NAMED_SECONDS = 10.0
TOOLS = ("ip", "unshare")
BALANCING = {
    "window_size": 16,
    "step_interval": 16,
    "num_redundant_experts": 2,
    "policy": "shuffle",
    "min_gain": 0,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("spread"), "qwen3_moe", num_hidden_layers=4)


class Nodes:
    """Launchers of one world on this machine, by node."""

    def __init__(self, model: str, *options: str) -> None:
        self.token = secrets.token_hex(16)
        self.port = free_port()
        self._meeting = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", self.port)
        self._model, self._options = model, options
        self._started: list[Server] = []

    def start(self, node: int, *options: str, model: str = "", token: str = "") -> Server:
        told = (model or self._model, *self._meeting, *SMALL, *self._options, "--node-rank", str(node), *options)
        server = Server(*told, token=token or self.token)
        self._started.append(server)
        return server

    def close(self) -> None:
        for server in self._started:
            server.end()


@contextmanager
def nodes_of(model: object, *options: str) -> Iterator[Nodes]:
    nodes = Nodes(str(model), *options)
    try:
        yield nodes
    finally:
        nodes.close()


def until(what: Callable[[], object], *servers: Server | Pod, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "\n".join(server.log() for server in servers)
        time.sleep(0.05)


MOVED = re.compile(r"rearrangement \(.*\) done: [1-9]")


def test_strangers_are_refused_by_name_and_a_world_over_two_nodes_comes_back_and_stops_in_order(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    experts = ("-tp", "2", "-ep", "--enable-eplb", "--eplb-config", json.dumps(BALANCING), "--restart-world")
    with nodes_of(checkpoint.folder, *experts) as nodes:
        head = nodes.start(0)
        other = str(make_model(tmp_path / "other"))
        different = (
            r"launcher of node 1 \(.*\) was started with other options than node 0: model: .*Qwen3MoeForCausalLM"
        )
        refused(nodes.start(1, token=secrets.token_hex(16)), "belongs to another world: this token is not its own")
        refused(nodes.start(1, model=other), different)
        assert re.search(f"refused: {different}", head.log()), head.log()
        assert "who does not know this world's token" in head.log()

        second = nodes.start(1)
        head.wait_ready()
        assert plain_answers(head, checkpoint.prompts) == checkpoint.answers
        refused(nodes.start(1, "--start-timeout-seconds", "1"), r"launcher of node 1 .* is here already .*--node-rank")

        second.member("worker.process", worker=1).kill()
        until_ready_again(head, 2)
        assert re.search(r"worker dp 0 tp 1 of node 1 \(pid \d+ on .*\) died", head.log()), head.log()
        until(lambda: plain_answers(head, checkpoint.prompts) != checkpoint.answers or MOVED.search(head.log()), head)
        assert plain_answers(head, checkpoint.prompts) == checkpoint.answers

        second.process.send_signal(signal.SIGTERM)
        assert second.process.wait(30) == 0, second.log()
        until(lambda: "starting this node's part of the next world" in head.log().split("world 2 is ready")[1], head)
        assert head.terminate() == 0, head.log()
        assert not head.wait_gone(5)


def refused(stranger: Server, sentence: str) -> None:
    assert stranger.process.wait(60) == 2, stranger.log()
    assert re.search(sentence, stranger.log()), stranger.log()
    assert "Traceback" not in stranger.log()


class Pod:
    """A node in a network namespace, with a host name of its own."""

    def __init__(self, pods: Pods, name: str, command: list[str], token: str, folder: Path) -> None:
        self._pods, self.name, self._log = pods, name, folder / f"{name}.log"
        environment = {**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)), TOKEN_ENVIRONMENT: token}
        whole = [sys.executable, "-m", "moe_serve", *command]
        self.process = pods.start(name, whole, environment, self._log)

    def log(self) -> str:
        return self._log.read_text()

    def worker(self) -> psutil.Process:
        """The first of its workers."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return next(each for each in family if "moe_serve.worker.process" in each.cmdline())

    def post(self, prompt: list[int]) -> list[int]:
        """Greedy token ids of an answer, asked for from within."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        url = f"http://{self._pods.addresses[self.name]}:8000/v1/completions"
        answer = self._pods.inside(self.name, lambda: httpx.post(url, json=body, timeout=60))
        assert answer.status_code == 200, answer.text
        return ids_of(answer.json()["choices"][0]["text"])

    def close(self) -> None:
        """Its first process takes all others of the namespace with it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in psutil.Process(self.process.pid).children(recursive=True):
                each.kill()
        self.process.kill()
        self.process.wait()


@pytest.mark.skipif(bool(why_not(TOOLS)), reason=why_not(TOOLS) or "pods can be made")
def test_two_machines_started_by_the_commands_of_the_page_answer_and_end_with_a_killed_worker_of_either(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (block,) = [block for block in blocks(ROOT / "docs" / "deploying.md") if "--nnodes" in block]
    told = [[str(checkpoint.folder) if word == "MODEL" else word for word in words] for words in commands(block)]
    assert [words[words.index("--node-rank") + 1] for words in told] == ["0", "1"]
    token = secrets.token_hex(16)
    pods = Pods(["HOST0", "HOST1"])
    with contextlib.ExitStack() as stack:
        stack.callback(pods.close)
        second, first = (
            Pod(pods, f"HOST{node}", [*told[node], *SMALL], token, tmp_path)
            for node in (1, 0)  # node 1 comes first
        )
        stack.callback(first.close)
        stack.callback(second.close)
        until(lambda: "world 1 is ready" in first.log() and "world 1 is ready" in second.log(), first, second)
        assert [first.post(prompt) for prompt in checkpoint.prompts] == checkpoint.answers
        killed = time.monotonic()
        second.worker().kill()
        assert first.process.wait(20) == WORLD_ENDED, first.log()
        assert second.process.wait(20) == 1, second.log()
        assert time.monotonic() - killed < NAMED_SECONDS
        for node in (first, second):
            assert re.search(r"worker dp 0 pp 1 tp 0 of node 1 \(pid \d+ on HOST1\) died", node.log()), node.log()
        assert "was killed by SIGKILL" in second.log()
