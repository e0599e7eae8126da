"""GET /world over real HTTP: a coordinator that answers over a real link, one that does not, and none."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from moe_serve.api import world
from moe_serve.api.world import CoordinatorWorld
from moe_serve.base.config import Config
from moe_serve.base.errors import EngineDead
from moe_serve.base.messages import ToMember
from moe_serve.base.topology import Topology
from moe_serve.base.world_messages import WorldAnswer, WorldAsk, WorldStatus
from tests.support.coordinator import RunningCoordinator
from tests.support.http_server import make_state, serving

STATUS = WorldStatus(
    number=1,
    generation=7,
    engines=2,
    ready=True,
    draining=False,
    ended="",
    missing=[],
    members=[],
    step_timeout_seconds=60,
)


@pytest.fixture
def running() -> Iterator[RunningCoordinator]:
    made = RunningCoordinator(Topology(dp=2), Config().agreement())
    yield made
    made.close()


def test_the_coordinator_answers_over_the_link_of_a_front_end(running: RunningCoordinator) -> None:
    _, _, _ = running.join(1)
    link, heard, _ = running.join(role="api")
    link.send(WorldAsk(5))
    answer: ToMember = heard.get(timeout=5)
    assert isinstance(answer, WorldAnswer)
    assert answer.number == 5
    assert [each.role for each in answer.world.members] == ["engine", "api"]
    assert any(name.startswith("engine dp 0") for name in answer.world.missing)


def test_an_answer_finds_its_question_and_a_late_one_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        asked: list[WorldAsk] = []
        desk = CoordinatorWorld()
        desk.send = asked.append
        waiting = [asyncio.create_task(desk.ask()) for _ in range(3)]
        while not asked:
            await asyncio.sleep(0.001)
        desk.hear(WorldAnswer(asked[0].number + 1, msgspec.structs.replace(STATUS, engines=9)))
        waiting.pop().cancel()  # one client goes away, the others wait on
        await asyncio.sleep(0.01)
        desk.hear(WorldAnswer(asked[0].number, STATUS))
        assert await asyncio.gather(*waiting) == [STATUS, STATUS]
        assert len(asked) == 1
        desk.hear(WorldAnswer(asked[0].number, STATUS))
        monkeypatch.setattr(world, "WORLD_SECONDS", 0.05)
        with pytest.raises(EngineDead, match=r"no answer in 0\.05 s; it lives in the launcher of rank 0"):
            await desk.ask()

    asyncio.run(ask())


def test_without_a_word_of_the_coordinator_the_server_tells_what_it_knows(model_folder: Path) -> None:
    with serving(make_state(model_folder)) as url:
        answer = httpx.get(f"{url}/world")
    assert answer.status_code == 503
    body = answer.json()
    assert body["world"] is None
    assert body["reason"] == "no coordinator is connected"
    assert body["frontend"]["not_ready"] is None
    assert body["frontend"]["pid"] > 0


def test_what_the_coordinator_says_is_the_answer(model_folder: Path) -> None:
    class Fixed:
        async def ask(self) -> WorldStatus:
            return STATUS

    state = make_state(model_folder)
    state.world = Fixed()
    with serving(state) as url:
        answer = httpx.get(f"{url}/world")
    assert (answer.status_code, answer.json()["world"]["generation"]) == (200, 7)
