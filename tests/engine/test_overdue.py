"""When a front-end asks after its requests and when it gives them up: a made-up clock, and engines made of lists."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serve.base.engine_messages import HeldAnswer, HeldAsk
from moe_serve.engine.overdue import LOOK_SECONDS, MOST_ASKED, QUIET_SECONDS, Overdue

LIMIT = 60.0


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watch:
    """An Overdue that is looked at every second; `lost` collects what it gave up."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.overdue = Overdue(clock=self.clock, limit=LIMIT)
        self.lost: dict[str, str] = {}

    def tick(self, seconds: float = LOOK_SECONDS) -> dict[int, HeldAsk]:
        self.clock.now += seconds
        asks, lost = self.overdue.look()
        self._lose(lost)
        return asks

    def wait(self, seconds: float) -> dict[int, HeldAsk]:
        """What was asked in that time."""
        asked: dict[int, HeldAsk] = {}
        for _ in range(round(seconds / LOOK_SECONDS)):
            asked |= self.tick()
        return asked

    def answer(self, dp: int, ask: HeldAsk, *unknown: str, computed: int = 0) -> None:
        told = HeldAnswer(dp=dp, number=ask.number, unknown=list(unknown), computed=computed)
        self._lose(self.overdue.answered(told))

    def _lose(self, lost: dict[str, str]) -> None:
        for name in lost:
            self.overdue.ended(name)
        assert not lost.keys() & self.lost.keys(), "a request is lost once"
        self.lost |= lost


@pytest.fixture
def watch() -> Watch:
    return Watch()


def test_a_quiet_request_is_asked_about_at_its_own_rank_and_one_with_events_is_not(watch: Watch) -> None:
    watch.overdue.sent("quiet", 1)
    watch.overdue.sent("talks", 1)
    watch.overdue.sent("done", 1)
    watch.overdue.ended("done")
    assert watch.wait(QUIET_SECONDS - 1) == {}
    watch.overdue.heard("talks")
    assert watch.tick() == {1: HeldAsk(1, ["quiet"])}
    assert watch.tick() == {}, "one question at a time"


def test_what_the_engine_does_not_know_is_lost_by_name_and_the_rest_waits_on(watch: Watch) -> None:
    for name in ("swallowed", "waits", "ends meanwhile"):
        watch.overdue.sent(name, 0)
    asked = watch.wait(QUIET_SECONDS)[0]
    watch.overdue.ended("ends meanwhile")  # its last event was on the way before the answer
    watch.answer(0, asked, "swallowed", "ends meanwhile")
    assert list(watch.lost) == ["swallowed"]
    assert "DP rank 0 does not know this request" in watch.lost["swallowed"]
    assert watch.wait(QUIET_SECONDS) == {0: HeldAsk(2, ["waits"])}


def test_a_request_may_wait_for_hours_while_its_engine_computes_for_others(watch: Watch) -> None:
    watch.overdue.sent("patient", 0)
    for step in range(1000):
        watch.answer(0, watch.wait(QUIET_SECONDS)[0], computed=step // 10)
    assert watch.lost == {}


def test_a_rank_that_was_idle_for_hours_is_not_blamed_for_that(watch: Watch) -> None:
    watch.overdue.sent("first", 0)
    watch.answer(0, watch.wait(QUIET_SECONDS)[0], computed=7)
    watch.overdue.ended("first")
    watch.wait(10 * LIMIT)
    watch.overdue.sent("second", 0)
    watch.answer(0, watch.wait(QUIET_SECONDS)[0], computed=7)
    assert watch.lost == {}


def test_a_rank_that_knows_its_requests_and_never_computes_is_given_up(watch: Watch) -> None:
    watch.overdue.sent("stuck", 0)
    for _ in range(round(LIMIT / QUIET_SECONDS)):
        watch.answer(0, watch.wait(QUIET_SECONDS)[0], computed=3)
        assert watch.lost == {}
    for _ in range(2):
        for rank, ask in watch.wait(QUIET_SECONDS).items():
            watch.answer(rank, ask, computed=3)
    assert "has computed nothing for 60 s (a multiple of --step-timeout-seconds)" in watch.lost["stuck"]


def test_a_rank_that_does_not_answer_loses_what_it_says_nothing_of_and_nothing_else(watch: Watch) -> None:
    for name, rank in (("mute", 0), ("talks", 0), ("elsewhere", 1)):
        watch.overdue.sent(name, rank)
    for _ in range(round(LIMIT + QUIET_SECONDS) + 1):
        watch.overdue.heard("talks")
        for rank, ask in watch.tick().items():
            if rank == 1:
                watch.answer(rank, ask, computed=round(watch.clock.now))
    assert list(watch.lost) == ["mute"]
    assert "DP rank 0 has not said whether it has this request for 60 s" in watch.lost["mute"]
    watch.overdue.ended("talks")
    watch.overdue.sent("next", 0)
    assert watch.wait(QUIET_SECONDS + 1)[0].request_ids == ["next"], "it is asked again"


def test_time_in_which_this_process_was_stopped_counts_for_nobody(watch: Watch) -> None:
    watch.overdue.sent("a", 0)
    asked = watch.wait(QUIET_SECONDS)[0]
    watch.tick(3600)
    assert watch.lost == {}
    watch.answer(0, asked)
    assert watch.lost == {}


def test_an_answer_to_a_question_of_a_line_that_is_gone_means_nothing(watch: Watch) -> None:
    watch.overdue.sent("a", 0)
    asked = watch.wait(QUIET_SECONDS)[0]
    watch.overdue.line_lost(0)
    watch.answer(0, asked, "a")
    watch.answer(5, asked, "a")
    assert watch.lost == {}
    assert watch.tick()[0].request_ids == ["a"]


def test_a_question_has_a_bound_and_everybody_comes_to_his_turn(watch: Watch) -> None:
    names = [f"r{number}" for number in range(2 * MOST_ASKED + 5)]
    for name in names:
        watch.overdue.sent(name, 0)
    asked: list[str] = []
    watch.wait(QUIET_SECONDS - 1)
    for computed in range(3):
        ask = watch.tick()[0]
        asked += ask.request_ids
        watch.answer(0, ask, computed=computed)
    assert asked == names


@dataclass
class Engine:
    """Takes what it is sent a while later, answers in order, works one request off after the other."""

    delay: float
    line: list[tuple[float, str | HeldAsk]] = field(default_factory=list)
    queue: list[str] = field(default_factory=list)
    computed: int = 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), swallows=st.floats(0, 0.3), steps=st.integers(2, 40))
def test_of_a_line_that_keeps_its_order_exactly_what_was_swallowed_is_lost(
    seed: int, swallows: float, steps: int
) -> None:
    """Random engines with random delays; `steps` seconds for each request, so that queues are long."""
    chance, watch = random.Random(seed), Watch()
    engines = [Engine(chance.uniform(0, LIMIT / 3)) for _ in range(2)]
    swallowed, finished = set(), set()
    for second in range(600):
        if second < 100 and chance.random() < 0.3:
            rank, name = chance.randrange(2), f"r{second}"
            watch.overdue.sent(name, rank)
            if chance.random() < swallows:
                swallowed.add(name)
            else:
                engines[rank].line.append((watch.clock.now, name))
        for rank, ask in watch.tick().items():
            engines[rank].line.append((watch.clock.now, ask))
        for rank, engine in enumerate(engines):
            while engine.line and engine.line[0][0] + engine.delay <= watch.clock.now:
                _, message = engine.line.pop(0)
                if isinstance(message, str):
                    engine.queue.append(message)
                else:
                    unknown = [name for name in message.request_ids if name not in engine.queue]
                    watch.answer(rank, message, *unknown, computed=engine.computed)
            if engine.queue:
                engine.computed += 1
                if engine.computed % steps == 0:
                    finished.add(name := engine.queue.pop(0))
                    watch.overdue.ended(name)
    assert watch.lost.keys() == swallowed
    assert not finished & watch.lost.keys()
