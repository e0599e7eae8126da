"""One rank per pod: network namespaces, a real load balancer in front, ranks that are started again when they end."""

from __future__ import annotations

import collections
import re
import threading
import time
from collections.abc import Iterator

import pytest

from bench.pods import Pods, Proxy, Ranks, complete_all, deployment, kill_and_wait, wait_spread, why_not
from moe_serve.cli.random_model import make_model
from tests.support.bad_requests import BAD
from tests.support.mixed_requests import assert_right, bodies, expected

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "pods can be made"),
]

SIZE = 4
NAMED_SECONDS = 10.0
World = tuple[Pods, Ranks, Proxy]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def world(model: str) -> Iterator[World]:
    balancing = ("--enable-eplb", "--eplb-config.num-redundant-experts", "8", "--eplb-config.step-interval", "64")
    often = ("--eplb-config.window-size", "64", "--eplb-config.policy", "shuffle", "--eplb-config.min-gain", "0")
    with deployment(model, SIZE, *balancing, *often, "--max-num-queued-reqs", "400") as made:
        yield made


def test_400_requests_at_once_are_right_and_spread_over_all_ranks_while_experts_move(world: World, model: str) -> None:
    pods, ranks, proxy = world
    asked = bodies(400)
    answers = complete_all(pods, "gate", proxy.url, asked)
    assert collections.Counter(answer.status_code for answer in answers) == {200: 400}
    assert_right(asked, answers, expected(model, asked))
    served = collections.Counter(answer.headers["X-Data-Parallel-Rank"] for answer in answers)
    assert set(served) == {str(rank) for rank in range(SIZE)}
    assert min(served.values()) > 400 / SIZE / 3, served
    assert re.search(r"rearrangement \(.*\) done: [1-9]", ranks.log("rank-0"))


def test_bad_bodies_get_their_refusal_from_whichever_rank(world: World) -> None:
    pods, _, proxy = world
    of_completions = [body for path, body, *_ in BAD if path == "/v1/completions"]
    assert of_completions
    answers = complete_all(pods, "gate", proxy.url, of_completions)
    assert all(400 <= answer.status_code < 500 for answer in answers)


def test_a_link_that_is_down_for_two_seconds_ends_nothing(world: World) -> None:
    pods, ranks, _ = world
    before = list(ranks.ends)
    pods.set_link("rank-2", up=False)
    time.sleep(2)
    pods.set_link("rank-2", up=True)
    time.sleep(8)
    assert ranks.ends == before
    assert ranks.wait_ready("gate", 5) < 5


@pytest.mark.parametrize("victim", ["rank-1", "rank-0", "rank-3"])
def test_a_killed_pod_turns_the_others_red_and_the_world_comes_back(world: World, victim: str) -> None:
    pods, ranks, proxy = world
    num_ends = len(ranks.ends)
    red, _ = kill_and_wait(ranks, victim)
    assert red < NAMED_SECONDS
    codes = collections.Counter(code for name, code in ranks.ends[num_ends:] if name != victim)
    assert set(codes) == {3}, ranks.ends[num_ends:]
    wait_spread(pods, proxy, SIZE)
    assert {answer.status_code for answer in complete_all(pods, "gate", proxy.url, bodies(20))} == {200}


def test_requests_under_way_when_a_pod_dies_end_with_an_answer_or_an_error(world: World) -> None:
    pods, ranks, proxy = world
    threading.Timer(1.0, ranks.kill, ["rank-2"]).start()
    begun = time.monotonic()
    answers = complete_all(pods, "gate", proxy.url, [body | {"max_tokens": 300} for body in bodies(40)])
    assert time.monotonic() - begun < 60
    assert {answer.status_code for answer in answers} <= {200, 500, 502, 503}
    assert any(answer.status_code != 200 for answer in answers), "none was under way"
    ranks.wait_ready("gate")


def test_a_link_that_stays_down_ends_the_world_by_name(world: World) -> None:
    pods, ranks, _ = world
    num_ends = len(ranks.ends)
    pods.set_link("rank-3", up=False)
    cut = time.monotonic()
    try:
        while any(ranks.get("gate", name, "/readyz", timeout=0.5) == 200 for name in ranks.names[:3]):
            assert time.monotonic() - cut < 30
            time.sleep(0.1)
        assert time.monotonic() - cut < 2 * NAMED_SECONDS
        while not any(name == "rank-0" for name, _ in ranks.ends[num_ends:]):
            assert time.monotonic() - cut < 40
            time.sleep(0.1)
        assert "dp 3" in ranks.log("rank-0") or "rank 3" in ranks.log("rank-0")
    finally:
        pods.set_link("rank-3", up=True)
    ranks.wait_ready("gate")


def test_sigterm_to_a_pod_lets_it_finish_and_takes_it_out_of_the_balancer(world: World) -> None:
    pods, ranks, proxy = world
    wait_spread(pods, proxy, SIZE)
    num_ends = len(ranks.ends)
    ranks.terminate("rank-1")
    deadline = time.monotonic() + 60
    while ("rank-1", 0) not in ranks.ends[num_ends:]:
        assert time.monotonic() < deadline, ranks.log("rank-1")[-2000:]
        time.sleep(0.1)
    ranks.wait_ready("gate")


@pytest.mark.parametrize("order", [[3, 1, 0, 2], [0, 1, 2, 3], [3, 2, 1, 0]])
def test_ranks_may_start_in_any_order(model: str, order: list[int]) -> None:
    with deployment(model, SIZE, order=order) as (pods, _, proxy):
        assert {answer.status_code for answer in complete_all(pods, "gate", proxy.url, bodies(8))} == {200}
