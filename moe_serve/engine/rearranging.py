"""One engine's part in a rearrangement of experts: orders go to its workers, progress into its votes, news out.

Nothing here waits for another rank: workers begin and go on between steps, and all ranks commit in the step in which
every vote says that the weights are here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import msgspec

from moe_serve.base.balance_messages import DropStage, Record, StageReport, StageState, StepLoad
from moe_serve.base.commands import PollStage, SetShares, StageExperts, StageStatus, StepPlan, StepResult
from moe_serve.engine.lockstep import Verdict, Vote
from moe_serve.executor.base import Executor

Order = StageExperts | SetShares | DropStage | Record
News = StageReport | StepLoad
ORDER_SECONDS = 60.0
BEAT_SECONDS = 1.0


class Rearranging:
    """`collect_interval` steps between two collections of load. One thread uses it.

    Orders to stage for another `generation` of the world are ignored.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        collect_interval: int,
        generation: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._interval = collect_interval
        self._generation = generation
        self._clock = clock
        self._status: StageStatus | None = None
        self._beaten = 0.0
        self._to_drop = 0
        """The newest epoch that is to be given up; it may be over, or not even have begun here."""
        self._recording = False
        self._planned = 0
        """The last step that was planned; until those before a new stage have ended they tell nothing of it."""
        self._before_stage = 0
        self._steps = 0
        self._collected: dict[int, int] = {}
        """Steps counted since the collection before, by the step that collects."""
        self._step_seconds = 0.0
        """Of the steps since the collection before."""
        self._news: list[News] = []
        self.wants_turn = False
        """Something to tell in a vote: a sleeping world should wake for it, once."""

    @property
    def active(self) -> bool:
        """A stage is under way, and needs polling."""
        return self._status is not None

    def hear(self, order: Order) -> None:
        """An order of the coordinator, between two steps."""
        match order:
            case StageExperts(generation=generation) if generation != self._generation:
                return
            case StageExperts():
                self._executor.submit(order).result(timeout=ORDER_SECONDS)
                self._status, self._beaten = StageStatus(epoch=order.epoch), self._clock()
                self._before_stage = self._planned
                self.wants_turn |= order.epoch == self._to_drop
            case SetShares():
                self._executor.submit(order).result(timeout=ORDER_SECONDS)
            case DropStage(epoch):
                self._to_drop = max(self._to_drop, epoch)
                self.wants_turn |= self._status is not None and self._status.epoch == epoch
            case Record(on):
                self._recording = on

    def vote(self, vote: Vote) -> Vote:
        """The vote with what this engine knows of the stage."""
        self.wants_turn = False
        status = self._status or StageStatus(epoch=0)
        return replace(
            vote,
            staged_epoch=status.epoch if status.staged else 0,
            dropped_epoch=status.epoch if status.epoch == self._to_drop else 0,
            pieces_posted=status.pieces_posted,
            recording=self._recording,
        )

    def plan(self, plan: StepPlan, verdict: Verdict) -> StepPlan:
        """The plan with what all ranks agreed on."""
        self._planned = plan.step
        self._steps += 1
        collects = verdict.recording or plan.step % self._interval == 0
        if collects:
            self._collected[plan.step], self._steps = self._steps, 0
        return msgspec.structs.replace(
            plan,
            commit_epoch=verdict.commit_epoch,
            drop_after_pieces=verdict.drop_after_pieces,
            collect_load=collects,
        )

    def learn(self, plan: StepPlan, result: StepResult) -> None:
        """What a step did; in the order in which they were planned."""
        steps = self._collected.pop(plan.step, 0)
        self._step_seconds += result.seconds
        if steps:
            seconds, self._step_seconds = self._step_seconds, 0.0
            if result.load:
                load = StepLoad(
                    step=plan.step,
                    steps=steps,
                    load=result.load,
                    step_seconds=seconds,
                    expert_seconds=result.expert_seconds,
                )
                self._news.append(load)
        if plan.commit_epoch and self._status is not None:
            self._report("committed", self._status, commit_seconds=result.commit_seconds)
            self._status = None
        if plan.step > self._before_stage:
            self._take(result.stage)

    def poll(self) -> None:
        """Go on with the stage while the world sleeps."""
        status = self._executor.submit(PollStage()).result(timeout=ORDER_SECONDS)
        assert isinstance(status, StageStatus)
        self._take(status if status.epoch else None)

    def take_news(self) -> list[News]:
        """What the coordinator should hear; each is given once."""
        news, self._news = self._news, []
        return news

    def _take(self, status: StageStatus | None) -> None:
        before, self._status = self._status, status
        if before is None:
            return
        if status is None:
            self._report("dropped", before)
        elif status.failed and not before.failed:
            self._report("failed", status)
        elif status.staged and not before.staged:
            self.wants_turn = True
            self._report("staged", status)
        elif status.pieces_posted > before.pieces_posted and self._clock() - self._beaten >= BEAT_SECONDS:
            self._beaten = self._clock()
            self._report("moving", status)

    def _report(self, state: StageState, status: StageStatus, *, commit_seconds: float = 0.0) -> None:
        self._news.append(
            StageReport(
                epoch=status.epoch,
                state=state,
                reason=status.failed,
                stage_seconds=status.seconds,
                commit_seconds=commit_seconds,
                busy_seconds=status.busy_seconds,
                bytes_received=status.bytes_received,
                generation=self._generation,
            )
        )
