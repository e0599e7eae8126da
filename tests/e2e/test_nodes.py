"""Two nodes of two ranks each, in network namespaces: a server on each (hybrid), or one for both (internal).

They are started with the commands of docs/deploying.md. HOST1's launcher stays when a world ends (--restart-world);
that of HOST0 ends, and is started again from outside.
"""

from __future__ import annotations

import collections
import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from bench.pods import Pods, Proxy, Ranks, complete_all, kill_and_wait, opened, wait_spread, why_not
from bench.pods_traffic import Stream, Traffic
from bench.report import ROOT
from moe_serve.cli.random_model import make_model
from moe_serve.launch.endings import WORLD_ENDED
from tests.support.mixed_requests import assert_right, bodies, expected
from tests.support.pages import blocks, commands

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.long,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "pods can be made"),
]

SIZE = 4
NAMED_SECONDS = 10.0
NODES = ("HOST0", "HOST1")
BALANCING = (
    *("--enable-eplb", "--eplb-config.num-redundant-experts", "8", "--eplb-config.step-interval", "16"),
    *("--eplb-config.window-size", "16", "--eplb-config.policy", "shuffle", "--eplb-config.min-gain", "0"),
)
PAGE = ROOT / "docs" / "deploying.md"
MOVED = re.compile(r"rearrangement \(.*\) done: [1-9]")


def parts(kind: str) -> dict[str, list[str]]:
    """What the page starts each node with; what all pods are given is left out."""
    flag = {"hybrid": "--data-parallel-hybrid-lb", "internal": "--headless"}[kind]
    (block,) = [block for block in blocks(PAGE) if flag in block]
    told = commands(block)
    shared = ("serve", "MODEL", "--data-parallel-address", "HOST0", "--host", "0.0.0.0")
    assert all(set(shared) - {"--host", "0.0.0.0"} <= set(words) for words in told)
    first, second = ([word for word in words if word not in shared] for words in told)
    return {"HOST0": first, "HOST1": [*second, "--restart-world"]}


@dataclass(frozen=True)
class World:
    pods: Pods
    nodes: Ranks
    proxy: Proxy

    @contextlib.contextmanager
    def traffic(self) -> Iterator[Traffic]:
        """Six streams that are under way."""
        traffic = Traffic(self.pods, "gate", self.proxy.url, count=6, max_tokens=120)
        try:
            traffic.wait_under_way(4)
            yield traffic
        finally:
            traffic.close()

    def ask(self, asked: list[dict[str, object]]) -> list:
        return complete_all(self.pods, "gate", self.proxy.url, asked)

    def wait_told(self, name: str, sentence: str, before: str, seconds: float) -> None:
        """Until a node's log says something that it had not said `before`."""
        deadline = time.monotonic() + seconds
        while sentence not in self.nodes.log(name)[len(before) :]:
            assert time.monotonic() < deadline, f"{name} does not say {sentence!r}:\n{self.nodes.log(name)[-3000:]}"
            time.sleep(0.05)

    def wait_code(self, name: str, num_ends: int, seconds: float) -> int:
        """The exit code with which a node's launcher ends after the first `num_ends` of all."""
        deadline = time.monotonic() + seconds
        while not (codes := [code for ended, code in self.nodes.ends[num_ends:] if ended == name]):
            assert time.monotonic() < deadline, f"{name} does not end:\n{self.nodes.log(name)[-3000:]}"
            time.sleep(0.05)
        return codes[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def right(model: str) -> dict[tuple[str, int], str]:
    return expected(model, bodies(80))


@pytest.fixture(scope="module", params=[("hybrid", (1, 0)), ("internal", (0, 1))], ids=lambda param: param[0])
def world(request: pytest.FixtureRequest, model: str) -> Iterator[World]:
    kind, order = request.param
    with opened(model, NODES, *BALANCING, parts=parts(kind)) as (pods, nodes, proxy):
        nodes.start([NODES[place] for place in order], pause=2.0)
        nodes.wait_ready("gate")
        wait_spread(pods, proxy, SIZE)
        yield World(pods, nodes, proxy)


def test_requests_at_once_are_right_and_spread_over_the_ranks_of_both_nodes_while_experts_move(
    world: World, right: dict[tuple[str, int], str]
) -> None:
    asked = bodies(80)
    for _ in range(2):
        answers = world.ask(asked)
        assert_right(asked, answers, right)
        served = collections.Counter(answer.headers["X-Data-Parallel-Rank"] for answer in answers)
        assert set(served) == {"0", "1", "2", "3"}
        assert min(served.values()) > 80 / 4 / 3, served
    assert MOVED.search(world.nodes.log("HOST0")), world.nodes.log("HOST0")[-3000:]


def test_a_link_that_is_down_for_two_seconds_ends_no_world_and_no_stream(world: World) -> None:
    before = list(world.nodes.ends)
    with world.traffic() as traffic:
        cut = time.monotonic()
        world.pods.set_link("HOST1", up=False)
        time.sleep(2)
        world.pods.set_link("HOST1", up=True)
        under_way = [stream for stream in traffic.streams if stream.was_under_way(cut)]
        time.sleep(2)
    assert world.nodes.ends == before
    assert under_way
    assert {stream.end for stream in under_way} == {"answer"}, under_way
    world.nodes.wait_ready("gate", 10)


def test_when_node_1_is_killed_node_0_says_so_and_ends_with_its_own_code_and_the_world_comes_back(
    world: World, right: dict[tuple[str, int], str]
) -> None:
    num_ends = len(world.nodes.ends)
    with world.traffic() as traffic:
        under_way = traffic.under_way()
        red, _ = kill_and_wait(world.nodes, "HOST1")
        assert world.wait_code("HOST0", num_ends, 1) == WORLD_ENDED
    assert red < NAMED_SECONDS
    assert_none_hung(traffic, under_way)
    assert_whole(world, right)


def test_when_node_0_is_killed_the_launcher_of_node_1_stays_for_the_next_world(
    world: World, right: dict[tuple[str, int], str]
) -> None:
    num_ends, before = len(world.nodes.ends), world.nodes.log("HOST1")
    with world.traffic() as traffic:
        under_way = traffic.under_way()
        red, _ = kill_and_wait(world.nodes, "HOST0")
        world.wait_told("HOST1", "starting this node's part of the next world", before, 1)
    assert red < NAMED_SECONDS
    assert "HOST1" not in {name for name, _ in world.nodes.ends[num_ends:]}
    assert_none_hung(traffic, under_way)
    assert_whole(world, right)


def test_a_link_that_stays_down_ends_the_world_by_name_on_both_sides(
    world: World, right: dict[tuple[str, int], str]
) -> None:
    num_ends, before = len(world.nodes.ends), {name: world.nodes.log(name) for name in NODES}
    with world.traffic() as traffic:
        under_way = traffic.under_way()
        world.pods.set_link("HOST1", up=False)
        cut = time.monotonic()
        try:
            assert world.wait_code("HOST0", num_ends, 2 * NAMED_SECONDS) == WORLD_ENDED
            assert "has not been heard for" in world.nodes.log("HOST0")[len(before["HOST0"]) :]
            world.wait_told("HOST1", "was silent for", before["HOST1"], 2 * NAMED_SECONDS)
            assert time.monotonic() - cut < 2 * NAMED_SECONDS
        finally:
            world.pods.set_link("HOST1", up=True)
        world.nodes.wait_ready("gate")
    assert_none_hung(traffic, under_way)
    assert_whole(world, right)


def assert_none_hung(traffic: Traffic, under_way: list[Stream]) -> None:
    """No stream of the whole time; those that were `under_way` at a death are cut off or told."""
    assert "hung" not in traffic.ends(), traffic.streams
    assert under_way
    assert {stream.end for stream in under_way} & {"error", "cut"}, under_way


def assert_whole(world: World, right: dict[tuple[str, int], str]) -> None:
    wait_spread(world.pods, world.proxy, SIZE)
    asked = bodies(12)
    assert_right(asked, world.ask(asked), right)
