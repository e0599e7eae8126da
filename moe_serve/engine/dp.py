"""A core among the data-parallel ranks: each turn is a vote, then a real step, a dummy step or falling asleep.

All ranks take the same turns: a rank without work still brings zero rows to every layer of a step, because the
others' tokens need its experts. With pipeline stages each turn begins a flight or ends one; all ranks have as many in
the air.
"""

from __future__ import annotations

import time

import msgspec

from moe_serve.base.engine_messages import LoadReport, TokenEvent
from moe_serve.base.progress import Phase, Progress
from moe_serve.engine.core import EngineCore
from moe_serve.engine.lockstep import Naps, Vote, decide, must_land
from moe_serve.engine.rearranging import Rearranging
from moe_serve.parallel.groups import ControlGroup


class DPRank:
    """`rearranging` where experts may move. `generation` of the world, for the votes."""

    def __init__(
        self,
        core: EngineCore,
        votes: ControlGroup,
        *,
        progress: Progress,
        rearranging: Rearranging | None = None,
        generation: int = 1,
    ) -> None:
        self.core = core
        self.rearranging = rearranging
        self.naps = Naps()
        self._group = votes
        self._progress = progress
        self._generation = generation
        self._step = 0
        self._undelivered: list[str] = []
        self._num_votes = 0
        self._vote_seconds = 0.0

    @property
    def wants_turn(self) -> bool:
        """Requests to serve, or news of a rearrangement for a vote: a sleeping world should wake."""
        return self.core.has_work or (self.rearranging is not None and self.rearranging.wants_turn)

    def turn(self) -> list[TokenEvent]:
        """Vote, then do what all ranks do; events of the step if there was one."""
        plan = self.core.schedule()
        self._progress.unfinished = self.core.scheduler.num_unfinished
        self._step += 1
        vote = Vote(
            self._step,
            self.naps.taken,
            self.core.has_work,
            plan.num_tokens,
            generation=self._generation,
            in_halves=plan.in_halves,
        )
        verdict = decide(self._exchange(vote if self.rearranging is None else self.rearranging.vote(vote)))
        if self.core.in_air and must_land(verdict):
            if plan.scheduled:
                self.core.scheduler.revert(plan)
            return self._land()
        dropped = self._undelivered + plan.dropped
        if not verdict.run:
            # Workers hear of forgotten requests with the next step.
            self._undelivered = dropped
            self.naps.fall_asleep()
            return []
        self._undelivered = []
        self._progress.enter(Phase.STEP, step=self._step)
        plan = msgspec.structs.replace(
            plan,
            step=self._step,
            dropped=dropped,
            tokens_by_dp_rank=verdict.tokens_by_dp_rank,
            in_halves=verdict.in_halves,
        )
        if self.rearranging is not None:
            plan = self.rearranging.plan(plan, verdict)
        self.core.begin(plan)
        return self._land() if self.core.is_full else []

    def _land(self) -> list[TokenEvent]:
        """End the oldest flight; its events."""
        flight = self.core.in_air[0]
        outcome = self.core.end(flight)
        if self.rearranging is not None:
            self.rearranging.learn(flight.plan, outcome.result)
        return outcome.events

    def report(self) -> LoadReport:
        """The core's report with what only this floor knows."""
        return msgspec.structs.replace(
            self.core.report(),
            step=self._step,
            votes=self._num_votes,
            vote_seconds=self._vote_seconds,
            naps=self.naps.taken,
        )

    def _exchange(self, vote: Vote) -> list[Vote]:
        self._progress.enter(Phase.VOTE, step=self._step)
        started = time.perf_counter()
        votes = [Vote.from_ints(values) for values in self._group.all_gather_ints(vote.to_ints())]
        self._num_votes += 1
        self._vote_seconds += time.perf_counter() - started
        return votes
