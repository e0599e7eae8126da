"""Several API servers of one launcher: one port, one picture of the load, one answer to whoever asks for figures."""

from __future__ import annotations

import itertools
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from moe_serve.cli.random_model import make_model
from tests.support.server import Server, serving

pytestmark = [pytest.mark.ranks, pytest.mark.long]

COUNT = 3
OPTIONS = ("-dp", "2", "-ep", "--dtype", "float32", "--max-model-len", "512", "--kv-cache-memory-bytes", str(2**24))
PROMPTS = [f"request number {number}" for number in range(24)]
SEQS, QUEUED = 2, 3
ENDED_SECONDS = 15.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serving(str(model), *OPTIONS, "-asc", str(COUNT)) as running:
        yield running


def ask(server: Server, prompt: str, max_tokens: int = 6) -> httpx.Response:
    """Over a connection of its own."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return server.post("/v1/completions", body)


def figures(server: Server) -> dict[str, float]:
    """Every series of one scrape, over a connection of its own."""
    lines = server.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def total(shown: dict[str, float], name: str) -> float:
    return sum(value for series, value in shown.items() if series.startswith(f"moe_serve:{name}{{"))


def counts(shown: dict[str, float]) -> dict[str, float]:
    """Series that may only grow."""
    return {series: value for series, value in shown.items() if re.search(r"_(total|count|sum|bucket)\{", series)}


def who_answered(server: Server, words: str) -> Counter[str]:
    return Counter(re.findall(rf"\[(api \d)\] 127.0.0.1:\d+ \"{words}", server.log()))


def test_requests_are_spread_over_all_of_them_and_all_ranks_and_figures_are_of_all_whoever_answers(
    server: Server,
) -> None:
    alone = [ask(server, prompt).json()["choices"][0]["text"] for prompt in PROMPTS]
    scrapes, over = [counts(figures(server))], threading.Event()

    def scrape() -> None:
        while not over.is_set():
            scrapes.append(counts(figures(server)))

    with ThreadPoolExecutor(len(PROMPTS) + 1) as pool:
        scraping = pool.submit(scrape)
        together = list(pool.map(lambda prompt: ask(server, prompt), PROMPTS))
        over.set()
        scraping.result()
    assert [answer.json()["choices"][0]["text"] for answer in together] == alone
    assert {answer.headers["X-data-parallel-rank"] for answer in together} == {"0", "1"}
    everybody = {f"api {place}" for place in range(COUNT)}
    assert set(who_answered(server, "POST /v1/completions")) == everybody
    deadline = time.monotonic() + ENDED_SECONDS
    while set(who_answered(server, "GET /metrics")) != everybody or len(scrapes) < 30:
        assert time.monotonic() < deadline
        scrapes.append(counts(figures(server)))
        assert total(scrapes[-1], "request_success_total") == 2 * len(PROMPTS)
    for before, after in itertools.pairwise(scrapes):
        assert not {series: (value, after.get(series)) for series, value in before.items() if after[series] < value}
    assert total(scrapes[-1], "generation_tokens_total") == 6 * 2 * len(PROMPTS)
    assert total(scrapes[-1], "e2e_request_latency_seconds_count") == 2 * len(PROMPTS)
    shown = figures(server)
    assert 1 <= total(shown, "http_connections") <= 2, "one that asks, and one that may just be closing"
    assert total(shown, "num_requests_running") == 0


def test_configuration_and_orders_are_the_same_from_each(server: Server) -> None:
    answers = [server.get("/config").json() for _ in range(6)]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0]["server"]["api_server_count"] == COUNT
    assert {server.get("/readyz").status_code for _ in range(6)} == {200}
    assert server.log().count("curl http") == 1


def test_what_may_wait_is_limited_over_all_of_them_and_refusals_are_counted_once(model: Path) -> None:
    limits = ("--max-num-seqs", str(SEQS), "--max-num-queued-reqs", str(QUEUED))
    admitted = 2 * SEQS + QUEUED
    with serving(str(model), *OPTIONS, *limits, "-asc", str(COUNT)) as running, ThreadPoolExecutor(40) as pool:
        asked = list(pool.map(lambda number: ask(running, f"request {number}", 400), range(40)))
        statuses = Counter(answer.status_code for answer in asked)
        assert set(statuses) == {200, 503}
        refused = [answer for answer in asked if answer.status_code == 503]
        assert all(answer.headers["Retry-After"] == "5" for answer in refused)
        # Long answers: nobody who was admitted had left when the last came.
        assert admitted <= statuses[200] <= admitted + COUNT - 1
        shown = figures(running)
        assert shown['moe_serve:requests_refused_total{model_name="' + str(model) + '",reason="queued_reqs"}'] == len(
            refused
        )
        assert len(who_answered(running, "POST /v1/completions")) == COUNT


def test_orders_work_through_any_of_them(model: Path) -> None:
    balanced = ("--enable-eplb", "--eplb-config.num-redundant-experts", "2", "--eplb-config.step-interval", "1000000")
    with serving(str(model), *OPTIONS, *balanced, "-asc", "2") as running:
        for _ in range(20):
            assert running.get("/eplb").status_code == 200
            assert running.post("/eplb/record/start", {}).status_code in (200, 409)
            assert running.post("/eplb/record/stop", {}).status_code in (200, 409)
        assert set(who_answered(running, "POST /eplb/record/start")) == {"api 0", "api 1"}


def test_one_that_is_killed_ends_the_world_by_name(model: Path) -> None:
    with serving(str(model), *OPTIONS, "-asc", str(COUNT)) as running:
        victims = [each for each in running.family() if "moe_serve.api.server" in each.cmdline()]
        assert len(victims) == COUNT
        victims[1].send_signal(signal.SIGKILL)
        assert running.process.wait(ENDED_SECONDS) == 1
        assert re.search(rf"API server \d \(pid {victims[1].pid} on \S+\) died", running.log())
        assert running.wait_gone(ENDED_SECONDS) == []


def test_all_of_them_finish_what_they_have_before_the_world_ends(model: Path) -> None:
    with serving(str(model), *OPTIONS, "-asc", str(COUNT)) as running, ThreadPoolExecutor(12) as pool:
        under_way = [pool.submit(ask, running, f"request {number}", 400) for number in range(12)]
        deadline = time.monotonic() + ENDED_SECONDS
        while total(figures(running), "num_requests_running") < 12:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert running.terminate(60) == 0
        assert [each.result().status_code for each in under_way] == [200] * 12
        assert len(re.findall(r"\[api \d\] draining: ", running.log())) == COUNT
        assert running.wait_gone(ENDED_SECONDS) == []


def test_a_stopped_one_keeps_no_new_connection_waiting_and_its_counts_are_still_shown(model: Path) -> None:
    with serving(str(model), *OPTIONS, "-asc", str(COUNT)) as running:
        for number in range(12):
            ask(running, f"request {number}")
        stopped = next(each for each in running.family() if "moe_serve.api.server" in each.cmdline())
        stopped.suspend()
        try:
            began = time.monotonic()
            assert [ask(running, f"again {number}").status_code for number in range(6)] == [200] * 6
            assert total(figures(running), "request_success_total") == 18
            assert time.monotonic() - began < 4, "before anybody could take it for dead"
        finally:
            stopped.resume()


def test_a_port_that_is_taken_is_refused_before_anything_is_started(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        server = Server(str(model), *OPTIONS, "-asc", "2", "--port", port)
        try:
            assert server.process.wait(ENDED_SECONDS) == 2
            assert f"the HTTP server cannot listen on 127.0.0.1:{port}: Address already in use" in server.log()
            assert "[engine" not in server.log()
        finally:
            server.end()
