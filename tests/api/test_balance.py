"""The routes under /eplb with a coordinator that answers as told, and how questions and answers find each other."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moe_serve.api import balance
from moe_serve.api.balance import CoordinatorBalance
from moe_serve.base.balance_messages import BalanceAnswer, BalanceAsk
from moe_serve.base.errors import EngineDead
from moe_serve.base.metrics import PREFIX
from tests.support.http_server import engines_of, make_state, serving

FIGURES = {
    "balancedness": {
        "ratio_of_sums": 0.8,
        "mean_of_ratios": 0.7,
        "mean_excess": 0.4,
        "peak_to_average_p95": 1.9,
    },
    "rebalances": 3,
    "skipped": {"no_moves": 5, "stage_failed": 1},
    "moved_experts": 40,
    "moved_bytes": 4000,
    "stage_seconds": [3, 1.5],
    "commit_seconds": [3, 0.25],
    "last_success": 1_700_000_000.0,
}
KEY = {"Authorization": "Bearer sesame"}
POSTS = ("plan", "apply", "rollback", "save", "record/start", "record/stop")


class FakeBalance:
    """Gives `answer` to everything but "metrics"; remembers what was asked."""

    def __init__(self) -> None:
        self.calm()

    def calm(self) -> None:
        self.answer: tuple[int, bytes] | EngineDead = (200, b'{"fine": true}')
        self.asked: list[tuple[str, bytes]] = []

    async def ask(self, action: str, body: bytes = b"") -> tuple[int, bytes]:
        self.asked.append((action, body))
        if isinstance(self.answer, EngineDead):
            raise self.answer
        return (200, json.dumps(FIGURES).encode()) if action == "metrics" else self.answer


class Balancing:
    def __init__(self, url: str, fake: FakeBalance, state: Any) -> None:
        self.url, self.fake, self.state = url, fake, state

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, headers=KEY, **options)

    def post(self, path: str, content: bytes = b"") -> httpx.Response:
        return httpx.post(self.url + path, headers=KEY | {"Content-Type": "application/json"}, content=content)


@pytest.fixture(scope="module")
def running(model_folder: Path) -> Iterator[Balancing]:
    state = make_state(
        model_folder, api_key="sesame", enable_expert_parallel=True, enable_eplb=True, max_body_bytes=50_000
    )
    state.balance = fake = FakeBalance()
    with serving(state) as url:
        yield Balancing(url, fake, state)


@pytest.fixture
def served(running: Balancing) -> Iterator[Balancing]:
    yield running
    running.fake.calm()
    engines_of(running.state).calm()
    running.state.draining = False


@pytest.mark.parametrize("action", POSTS)
def test_a_post_is_passed_on_with_its_body_and_answered_with_status_and_body(served: Balancing, action: str) -> None:
    served.fake.answer = (202, b'{"moved": 3}')
    answer = served.post(f"/eplb/{action}", b'{"policy": "sticky"}')
    assert (answer.status_code, answer.json()) == (202, {"moved": 3})
    assert answer.headers["content-type"] == "application/json"
    assert served.fake.asked == [(action, b'{"policy": "sticky"}')]


def test_the_state_is_a_get(served: Balancing) -> None:
    assert served.get("/eplb").json() == {"fine": True}
    assert served.fake.asked == [("state", b"")]


def test_a_dump_is_a_file(served: Balancing) -> None:
    served.fake.answer = (200, b"\x00\x01")
    dump = served.get("/eplb/record/dump")
    assert dump.content == b"\x00\x01"
    assert dump.headers["content-type"] == "application/octet-stream"
    assert "expert_load.safetensors" in dump.headers["content-disposition"]


def test_a_dump_that_is_refused_is_json(served: Balancing) -> None:
    served.fake.answer = (409, b'{"error": {}}')
    dump = served.get("/eplb/record/dump")
    assert dump.status_code == 409
    assert dump.headers["content-type"] == "application/json"
    assert "content-disposition" not in dump.headers


@pytest.mark.parametrize("path", ["/eplb", "/eplb/record/dump", *(f"/eplb/{action}" for action in POSTS)])
def test_every_route_needs_the_key(served: Balancing, path: str) -> None:
    method = "POST" if path.removeprefix("/eplb/") in POSTS else "GET"
    assert httpx.request(method, served.url + path).status_code == 401
    assert served.fake.asked == []


def test_a_get_changes_nothing(served: Balancing) -> None:
    for action in POSTS:
        assert served.get(f"/eplb/{action}").status_code == 405
    assert served.fake.asked == []


def test_a_body_over_the_limit_goes_no_further(served: Balancing) -> None:
    assert served.post("/eplb/apply", b" " * 60_000).status_code == 413
    assert served.fake.asked == []


def test_nothing_is_rearranged_while_the_server_shuts_down(served: Balancing) -> None:
    served.state.start_draining()
    answer = served.post("/eplb/apply")
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert served.get("/eplb").status_code == 200, "looking is free"
    assert [action for action, _ in served.fake.asked] == ["state"]


def test_a_coordinator_that_does_not_answer_is_a_503_and_the_other_metrics_stay(served: Balancing) -> None:
    served.fake.answer = EngineDead("the coordinator gave no answer")
    answer = served.get("/eplb")
    assert answer.status_code == 503
    assert "no answer" in answer.json()["error"]["message"]
    metrics = served.get("/metrics")
    assert metrics.status_code == 200
    assert "num_requests_running" in metrics.text
    assert "eplb" not in metrics.text


def test_the_figures_are_metrics_under_their_names(served: Balancing) -> None:
    found = {
        (sample.name.removeprefix(PREFIX), sample.labels.get("reason", "")): sample.value
        for family in text_string_to_metric_families(served.get("/metrics").text)
        for sample in family.samples
        if "eplb" in sample.name
    }
    assert found == {
        ("eplb_balancedness", ""): 0.8,
        ("eplb_balancedness_mean_of_ratios", ""): 0.7,
        ("eplb_mean_excess", ""): 0.4,
        ("eplb_peak_to_average_p95", ""): 1.9,
        ("eplb_rebalances_total", ""): 3,
        ("eplb_rebalances_skipped_total", "no_moves"): 5,
        ("eplb_rebalances_skipped_total", "stage_failed"): 1,
        ("eplb_moved_experts_total", ""): 40,
        ("eplb_moved_bytes_total", ""): 4000,
        ("eplb_stage_seconds_count", ""): 3,
        ("eplb_stage_seconds_sum", ""): 1.5,
        ("eplb_commit_seconds_count", ""): 3,
        ("eplb_commit_seconds_sum", ""): 0.25,
        ("eplb_last_success_timestamp", ""): 1_700_000_000.0,
    }


def test_a_server_without_a_coordinator_says_so(model_folder: Path) -> None:
    with serving(make_state(model_folder)) as url:
        assert httpx.get(f"{url}/eplb").status_code == 503
        assert httpx.get(f"{url}/metrics").status_code == 200


# --- questions over the link -----------------------------------------------------------------------------------------


def asking(answer: Callable[[CoordinatorBalance, BalanceAsk], None]) -> CoordinatorBalance:
    """Whose link passes every question to `answer`."""
    made = CoordinatorBalance()
    made.send = lambda ask: answer(made, ask)
    return made


def test_answers_find_their_questions_whatever_the_order() -> None:
    async def both() -> tuple[tuple[int, bytes], tuple[int, bytes]]:
        waiting: list[BalanceAsk] = []

        def keep(made: CoordinatorBalance, ask: BalanceAsk) -> None:
            waiting.append(ask)
            if len(waiting) == 2:
                for each in reversed(waiting):
                    made.hear(BalanceAnswer(number=each.number, status=200, body=each.action.encode()))

        made = asking(keep)
        first, second = await asyncio.gather(made.ask("plan"), made.ask("save"))
        return first, second

    assert asyncio.run(both()) == ((200, b"plan"), (200, b"save"))


def test_silence_ends_with_an_error_and_a_late_answer_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "ANSWER_SECONDS", 0.05)

    async def ask() -> None:
        asks: list[BalanceAsk] = []
        made = asking(lambda _, ask: asks.append(ask))
        with pytest.raises(EngineDead, match=r"no answer about load balancing in 0\.05 s"):
            await made.ask("plan")
        made.hear(BalanceAnswer(number=asks[0].number, status=200, body=b""))

    asyncio.run(ask())


def test_before_the_link_stands_there_is_nobody_to_ask() -> None:
    with pytest.raises(EngineDead, match="not connected"):
        asyncio.run(CoordinatorBalance().ask("state"))
