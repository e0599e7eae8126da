"""An engine's part in a rearrangement: above all that no order, delay or failure leaves one half-applied or unended."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serve.base.balance_messages import DropStage, Record, StageReport, StepLoad
from moe_serve.base.commands import (
    Command,
    Done,
    PollStage,
    Reply,
    SetShares,
    StageExperts,
    StageStatus,
    StepPlan,
    StepResult,
    WorkerFacts,
)
from moe_serve.base.errors import Conflict
from moe_serve.engine.lockstep import Verdict, Vote
from moe_serve.engine.rearranging import Rearranging
from moe_serve.eplb.rebalancer import STAGE_SECONDS
from moe_serve.eplb.solving import propose
from tests.support.stage_world import World

STAGE = StageExperts(epoch=3, rows={}, shares={})
VOTE = Vote(1, 0, True, 5)


class Script:
    """An executor whose workers stand as they are told."""

    def __init__(self) -> None:
        self.stage: StageStatus | None = None
        self.commands: list[Command] = []

    def start(self) -> WorkerFacts:
        raise NotImplementedError

    def submit(self, command: Command) -> Future[Reply]:
        self.commands.append(command)
        future: Future[Reply] = Future()
        future.set_result((self.stage or StageStatus(epoch=0)) if isinstance(command, PollStage) else Done())
        return future

    def close(self) -> None:
        return


class Sim:
    """One engine with a script and a clock."""

    def __init__(self, interval: int = 1000) -> None:
        self.script = Script()
        self.now = 0.0
        self.steps = 0
        self.engine = Rearranging(self.script, collect_interval=interval, clock=lambda: self.now)

    def step(self, *, commit: int = 0, drop: int = -1, recording: bool = False) -> StepPlan:
        """A step whose workers answer with the script's stage, and with the load if it is to be collected."""
        self.steps += 1
        verdict = Verdict(True, [5, 0], commit_epoch=commit, drop_after_pieces=drop, recording=recording)
        plan = self.engine.plan(StepPlan(step=self.steps, scheduled=[], tokens_by_dp_rank=[5, 0]), verdict)
        load = b"x" if plan.collect_load else b""
        result = StepResult(step=self.steps, stage=self.script.stage, load=load, seconds=0.5, commit_seconds=0.25)
        self.engine.learn(plan, result)
        return plan

    def states(self) -> list[str]:
        return [news.state for news in self.engine.take_news() if isinstance(news, StageReport)]


def test_a_stage_goes_to_the_workers_and_its_progress_into_votes_and_news() -> None:
    sim = Sim()
    assert sim.engine.vote(VOTE) == VOTE
    sim.engine.hear(STAGE)
    assert sim.script.commands == [STAGE]
    assert sim.engine.active
    assert sim.engine.vote(VOTE).staged_epoch == 0
    sim.script.stage = StageStatus(epoch=3, pieces_posted=2)
    sim.step()
    assert sim.engine.vote(VOTE).pieces_posted == 2
    sim.script.stage = StageStatus(epoch=3, staged=True, pieces_posted=4, bytes_received=80, seconds=1.5)
    sim.step()
    assert sim.engine.wants_turn
    assert sim.engine.vote(VOTE).staged_epoch == 3
    assert not sim.engine.wants_turn, "once is enough"
    sim.script.stage = None
    sim.step(commit=3)
    assert not sim.engine.active
    staged, committed = (news for news in sim.engine.take_news() if isinstance(news, StageReport))
    assert (staged.state, staged.stage_seconds, staged.bytes_received) == ("staged", 1.5, 80)
    assert (committed.state, committed.commit_seconds, committed.bytes_received) == ("committed", 0.25, 80)


def test_load_is_told_with_the_seconds_of_the_steps_since_it_was_told_last() -> None:
    sim = Sim(interval=3)
    for _ in range(7):
        sim.step()
    sim.now += 3600
    sim.step(recording=True)
    told = [(news.step, news.steps, news.step_seconds) for news in sim.engine.take_news() if isinstance(news, StepLoad)]
    assert told == [(3, 3, 1.5), (6, 3, 1.5), (8, 2, 1.0)]


def test_an_order_of_another_generation_of_the_world_is_not_carried_out() -> None:
    sim = Sim()
    sim.engine.hear(StageExperts(epoch=3, rows={}, shares={}, generation=2))
    assert sim.script.commands == []
    assert not sim.engine.active


def test_while_the_world_sleeps_a_stage_goes_on_by_polling_and_asks_for_a_turn_once() -> None:
    sim = Sim()
    sim.engine.hear(STAGE)
    sim.script.stage = StageStatus(epoch=3, pieces_posted=1)
    sim.engine.poll()
    assert not sim.engine.wants_turn
    sim.script.stage = StageStatus(epoch=3, staged=True)
    sim.engine.poll()
    assert sim.engine.wants_turn
    sim.engine.vote(VOTE)
    sim.engine.poll()
    assert not sim.engine.wants_turn
    assert sim.states() == ["staged"]


def test_a_failure_is_told_once_and_never_voted_as_staged() -> None:
    sim = Sim()
    sim.engine.hear(STAGE)
    sim.script.stage = StageStatus(epoch=3, failed="a checksum")
    sim.engine.poll()
    sim.engine.poll()
    (news,) = sim.engine.take_news()
    assert isinstance(news, StageReport)
    assert (news.state, news.reason) == ("failed", "a checksum")
    assert sim.engine.vote(VOTE).staged_epoch == 0


def test_a_drop_is_voted_until_it_is_done_then_told() -> None:
    sim = Sim()
    sim.engine.hear(STAGE)
    sim.engine.hear(DropStage(3))
    assert sim.engine.wants_turn
    assert sim.engine.vote(VOTE).dropped_epoch == 3
    sim.script.stage = StageStatus(epoch=3, pieces_posted=1)
    sim.step(drop=1)
    assert sim.engine.vote(VOTE).dropped_epoch == 3, "a transfer is still to end"
    sim.script.stage = None
    sim.engine.poll()
    assert sim.states() == ["dropped"]
    assert sim.engine.vote(VOTE) == VOTE


def test_a_drop_that_comes_after_the_commit_is_forgotten() -> None:
    sim = Sim()
    sim.engine.hear(STAGE)
    sim.script.stage = StageStatus(epoch=3, staged=True)
    sim.engine.poll()
    sim.engine.hear(DropStage(3))
    sim.script.stage = None
    sim.step(commit=3)
    assert sim.engine.vote(VOTE) == VOTE
    sim.engine.hear(DropStage(3))
    sim.engine.hear(StageExperts(epoch=4, rows={}, shares={}))
    assert sim.engine.vote(VOTE).dropped_epoch == 0


def test_a_drop_that_overtakes_its_stage_is_kept_for_it() -> None:
    sim = Sim()
    sim.engine.hear(DropStage(3))
    assert sim.engine.vote(VOTE) == VOTE, "there is nothing to give up yet"
    sim.engine.hear(STAGE)
    assert sim.engine.wants_turn
    assert sim.engine.vote(VOTE).dropped_epoch == 3


def test_weights_that_keep_moving_are_a_heartbeat_once_a_second() -> None:
    sim = Sim()
    sim.engine.hear(STAGE)
    for piece in range(1, 41):
        sim.now += 0.1
        sim.script.stage = StageStatus(epoch=3, pieces_posted=piece)
        sim.engine.poll()
    assert 3 <= len(sim.states()) <= 4
    for _ in range(40):
        sim.now += 0.1
        sim.engine.poll()
    assert sim.states() == [], "a stage that stands still is silent"


def test_load_is_collected_at_the_same_steps_everywhere_and_at_every_step_while_recording() -> None:
    sim = Sim(interval=4)
    collected = [sim.step().collect_load for _ in range(8)]
    assert collected == [False, False, False, True] * 2
    assert [news.steps for news in sim.engine.take_news() if isinstance(news, StepLoad)] == [4, 4]
    sim.engine.hear(Record(on=True))
    assert sim.engine.vote(VOTE).recording
    assert not sim.step().collect_load, "one engine alone does not begin"
    assert sim.step(recording=True).collect_load
    assert sim.step(recording=True).collect_load
    assert [news.steps for news in sim.engine.take_news() if isinstance(news, StepLoad)] == [2, 1]
    sim.engine.hear(Record(on=False))
    assert not sim.engine.vote(VOTE).recording


def test_shares_go_to_the_workers() -> None:
    sim = Sim()
    order = SetShares(epoch=0, shares={})
    sim.engine.hear(order)
    assert sim.script.commands == [order]
    assert not sim.engine.active


# --- all engines together, in a simulation ---------------------------------------------------------------------------


def run(world: World, *, rounds: int = 40, faults: bool = True) -> None:
    """Requests, rearrangements, naps, recordings and faults at random times; then until all is at rest."""
    chance = world.chance
    for _ in range(rounds):
        event = chance.random()
        if event < 0.25:
            world.arrive(chance.randrange(len(world.engines)), chance.randint(1, 6))
        elif event < 0.6:
            ask_for_a_rearrangement(world)
        elif event < 0.7:
            world.send(world.rebalancer.record(chance.random() < 0.5))
        elif faults and event < 0.8:
            world.hub.spoil = True
        elif faults and event < 0.9:
            ask_for_a_rearrangement(world)
            for _ in range(chance.randint(0, 15)):
                go_on(world)
            world.now += STAGE_SECONDS + 1
        for _ in range(chance.randint(0, 60)):
            go_on(world)
    until_at_rest(world)


def ask_for_a_rearrangement(world: World) -> None:
    rebalancer = world.rebalancer
    if not rebalancer.load().any():
        return
    try:
        plan = propose(rebalancer.situation(), rebalancer.policy)
        world.send(rebalancer.apply(plan, world.now, why="request"))
    except Conflict:
        assert rebalancer.in_flight


def go_on(world: World) -> None:
    world.now += 0.01
    world.move(world.chance.randrange(len(world.engines)))
    if world.chance.random() < 0.3:
        world.coordinate()


def until_at_rest(world: World) -> None:
    for _ in range(20_000):
        go_on(world)
        if world.at_rest:
            break
    assert world.at_rest, f"something never ends: {world.engines}"
    world.check()
    rows = world.engines[0].workers.ranks[0].balance._migrator.rows
    served = dict(enumerate(world.rebalancer.placement.physical_to_logical_LP.tolist()))
    assert served == rows, "the coordinator believes otherwise"
    epochs = {rank.balance._epoch for engine in world.engines for rank in engine.workers.ranks}
    assert epochs == {world.rebalancer.epoch}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), dp=st.integers(1, 3), tp=st.integers(1, 2), reorder=st.booleans())
def test_nothing_is_half_applied_and_everything_ends_whatever_is_late_lost_or_broken(
    seed: int, dp: int, tp: int, reorder: bool
) -> None:
    if dp * tp == 1:
        tp = 2
    world = World(seed, dp=dp, tp=tp, reorder=reorder)
    run(world)
    ended = [entry for entry in world.rebalancer.history if "epoch" in entry]
    totals = world.rebalancer.totals
    assert totals.rebalances == sum(not entry["failure"] for entry in ended)


def test_the_simulation_reaches_commits_failures_and_silences() -> None:
    """So that the property above is about something."""
    reasons: dict[str, int] = {}
    rebalances = 0
    for seed in range(12):
        world = World(seed, dp=2, tp=1 + seed % 2)
        run(world)
        rebalances += world.rebalancer.totals.rebalances
        for reason, count in world.rebalancer.totals.skipped.items():
            reasons[reason] = reasons.get(reason, 0) + count
    assert rebalances > 10
    assert reasons.get("stage_failed", 0) > 2, reasons
    assert reasons.get("stage_silent", 0) > 2, reasons


@pytest.mark.parametrize("tp", [1, 2])
def test_a_sleeping_world_wakes_to_commit_and_sleeps_again(tp: int) -> None:
    world = World(1, dp=2, tp=tp)
    world.arrive(0, 8)
    until_at_rest(world)
    naps, steps = world.engines[0].naps.taken, world.steps
    before = world.rebalancer.placement
    ask_for_a_rearrangement(world)
    until_at_rest(world)
    assert world.rebalancer.totals.rebalances == 1
    assert world.rebalancer.placement is not before
    assert world.engines[0].naps.taken > naps
    assert world.steps - steps < 20, "a few turns: news of each engine, and the commit"
