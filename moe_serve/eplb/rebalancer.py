"""When experts move, and how a rearrangement goes on: a pure state machine, given loads and news, giving orders.

What takes long it does not work out itself: it asks (`take_questions()`), one thing at a time, and is told the answer
(`hear_solved()`). Meanwhile news keep coming in; an answer that they have made worthless is dropped with its reason.

A rearrangement is a target placement, carried out in chunks of layers. Each chunk is an epoch: every engine stages it,
the votes commit it in one step everywhere, the next chunk follows. A chunk that fails anywhere, or makes no progress
for too long, is given up, and with it the rest; what was committed before stays, and is a whole placement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from moe_serve.base.balance_messages import DropStage, Record, StageReport, StepLoad
from moe_serve.base.eplb_config import EPLBConfig
from moe_serve.base.errors import ConfigError, Conflict
from moe_serve.base.topology import Topology
from moe_serve.eplb.answers import UNDER_WAY
from moe_serve.eplb.books import INTERVAL, MAX_HISTORY, Books, Totals
from moe_serve.eplb.forecast import Forecast
from moe_serve.eplb.inquiry import Asked, Inquiry
from moe_serve.eplb.nodes import NodeSizes
from moe_serve.eplb.placement import Placement
from moe_serve.eplb.policies.base import Floats
from moe_serve.eplb.questions import Ordered, Planned, PlanQuestion, SharesQuestion, Situation, Solved, Unsolved
from moe_serve.eplb.rearrangement import Chunk, ForEngine, Order, Proposal, Rearrangement
from moe_serve.eplb.window import LoadWindow, Recording

STAGE_SECONDS = 60.0
"""A chunk that is neither committed nor dropped after this long without news is given up."""
ROLLBACK = "rollback"
FAILED, SILENT, UNSOLVED = "stage_failed", "stage_silent", "stage_unsolved"
FIRST_INTERVAL_SHARE = 4
SHARE_REFRESH_STEPS = 50


class Rebalancer:
    """Experts on the ranks of `topology`; `expert_bytes` of one in one layer, which the workers tell later.

    Times are seconds of any clock, but `unix_time` is what the metrics tell. What it returns are orders for engines;
    it does nothing itself. `policy` as in solving.propose; the configured one if None.
    """

    def __init__(
        self,
        eplb_config: EPLBConfig,
        topology: Topology,
        placement: Placement,
        *,
        policy: str | None = None,
        expert_bytes: int = 0,
        num_groups: int = 1,
        unix_time: Callable[[], float],
    ) -> None:
        self.eplb_config = eplb_config
        self.topology = topology
        self.placement = placement
        self.epoch = 0
        self.books = Books(unix_time)
        self.recording = Recording()
        self.window = LoadWindow(placement.num_layers, placement.num_logical, eplb_config.window_size)
        self._log: list[str] = []
        self.policy = policy or eplb_config.policy
        self._forecast = Forecast((), eplb_config.prefer_local, expert_bytes)
        self._num_groups = num_groups
        self._until_next = max(1, eplb_config.step_interval // FIRST_INTERVAL_SHARE)
        self._since_refresh = 0
        self._step = 0
        self._now: Rearrangement | None = None
        self._previous: list[Placement] = []
        self._next_epoch = 1
        self._inquiry = Inquiry()

    # -- what comes in --

    def set_expert_bytes(self, expert_bytes: int) -> None:
        """What the workers found one expert to take in one layer; said before the first load."""
        self._forecast = replace(self._forecast, expert_bytes=expert_bytes)

    def set_nodes(self, node_sizes: NodeSizes) -> None:
        """Who shares a node, known once everybody has come; said before the first load."""
        self._forecast = replace(self._forecast, node_sizes=node_sizes)

    def hear_load(self, load: StepLoad, now: float) -> list[ForEngine]:
        """A bucket of load; perhaps it is time to ask for a rearrangement, or for another split over the copies."""
        counts = self.window.add(load.steps, load.load, load.step_seconds, load.expert_seconds)
        sends: list[ForEngine] = []
        if self.recording.on and load.steps == 1:
            self.recording.add(counts)
            if self.recording.full:
                self._log.append(f"the recording of expert load is full after {len(self.recording.steps)} steps")
                sends += self._all(Record(on=False))
        self._step = load.step
        self._until_next -= load.steps
        self._since_refresh += load.steps
        if self._now is None and not self._inquiry.is_open:
            if self._until_next <= 0:
                self._until_next = self.eplb_config.step_interval
                self._consider()
            elif self._since_refresh >= SHARE_REFRESH_STEPS:
                self._since_refresh = 0
                self._refresh_shares()
        return sends

    def hear_stage(self, dp: int, report: StageReport, now: float) -> list[ForEngine]:
        """News of a chunk from one engine."""
        chunk = None if self._now is None else self._now.chunk
        if self._now is None or chunk is None or report.epoch != chunk.epoch:
            return []
        chunk.last_news = now
        if report.state == "staged":
            chunk.staged.add(dp)
            return []
        if report.state == "moving":
            return []
        if report.state == "failed":
            return self._give_up(chunk, now, FAILED, f"engine dp {dp}: {report.reason}")
        chunk.done[dp] = report
        if len(chunk.done) < self.topology.dp:
            return []
        if report.state == "committed":
            return self._committed(self._now, chunk, now)
        return self._finish(self._now, now, failure=chunk.dropping, reason=chunk.reason)

    def tick(self, now: float) -> list[ForEngine]:
        """Give up a chunk without news; call it about twice a second."""
        chunk = None if self._now is None else self._now.chunk
        if chunk is None or now - chunk.last_news < STAGE_SECONDS:
            return []
        if chunk.dropping:
            chunk.last_news = now
            named = ", ".join(f"dp {dp}" for dp in range(self.topology.dp) if dp not in chunk.done)
            self._log.append(f"still giving up epoch {chunk.epoch} of a rearrangement; waiting for engines {named}")
            return []
        missing = [dp for dp in range(self.topology.dp) if dp not in chunk.staged and dp not in chunk.done]
        named = ", ".join(f"dp {dp}" for dp in missing) or "a step in which to commit"
        return self._give_up(chunk, now, SILENT, f"no news for {STAGE_SECONDS:g} s; waiting for {named}")

    def hear_solved(self, solved: Solved, now: float) -> list[ForEngine]:
        """The answer to a question; `solved.seconds` by the clock of who worked it out."""
        asked = self._inquiry.close(solved)
        if isinstance(asked, str):
            self._log.append(f"dropped what came too late: {asked}")
            return []
        result = solved.result
        reason = result.reason if isinstance(result, Unsolved) else ""
        if isinstance(asked, PlanQuestion):
            return self._weigh(result.proposal, now) if isinstance(result, Planned) else self._no_plan(reason)
        if isinstance(result, Ordered):
            orders = zip(result.engines, solved.bodies, strict=True)
            if self._now is not None:  # no stage is under way when other shares are asked for
                self._now.chunk = Chunk(asked.epoch, asked.layers, now)
            return [ForEngine(dp, order) for engines, order in orders for dp in engines]
        return self._no_shares(asked, reason, now)

    def take_questions(self) -> list[Asked]:
        """What is to be worked out, each given once."""
        return self._inquiry.take()

    def take_log(self) -> list[str]:
        """Lines for people, each given once."""
        lines, self._log = self._log, []
        return lines

    @property
    def history(self) -> list[dict[str, object]]:
        """What was done and what was not, oldest first."""
        return self.books.history

    @property
    def totals(self) -> Totals:
        return self.books.totals

    @property
    def in_flight(self) -> bool:
        return self._now is not None

    @property
    def previous(self) -> Placement | None:
        """What was served before the last rearrangement."""
        return self._previous[-1] if self._previous else None

    # -- what it can be asked --

    def situation(self) -> Situation:
        """What a plan is made from now."""
        return Situation(
            self.epoch, self.load(), self.placement, self._forecast, self._num_groups, seed=self._next_epoch
        )

    def next_number(self) -> int:
        """For one more question."""
        return self._inquiry.next_number()

    def apply(self, plan: Proposal, now: float, *, why: str) -> list[ForEngine]:
        """Begin a rearrangement; ConfigError while one is under way or if nothing would change."""
        if self._now is not None:
            raise Conflict(UNDER_WAY)
        if plan.epoch != self.epoch:
            raise Conflict("the placement has changed while this was planned; ask again")
        if not plan.chunks:
            raise ConfigError("the placement is the one that is served: nothing to do")
        meanwhile = f"a rearrangement ({why}) began meanwhile"
        if isinstance(self._inquiry.forget(meanwhile), PlanQuestion):
            self._skip("late", meanwhile)
        self._now = Rearrangement(plan, self.placement, list(plan.chunks), now, self._step, why)
        self._until_next = self.eplb_config.step_interval
        self._ask_chunk(self._now)
        return []

    def record(self, on: bool) -> list[ForEngine]:
        """Begin to collect the load of every step, or stop."""
        if on:
            self.recording.start()
        else:
            self.recording.on = False
        return self._all(Record(on))

    def load(self) -> Floats:
        """float64 (L, E) of the window, prefill and decode together."""
        total: Floats = self.window.load().sum(axis=1).astype(np.float64)
        return total

    # -- deciding --

    def _consider(self) -> None:
        """The interval is over: ask the policy, if there is anything to ask about."""
        if not self.load().any():
            self._skip("no_load", "no tokens were seen")
        else:
            situation = replace(self.situation(), parts=self.window.parts())
            self._inquiry.ask(PlanQuestion(number=self.next_number(), situation=situation, policy=self.policy))

    def _weigh(self, plan: Proposal, now: float) -> list[ForEngine]:
        if self.eplb_config.log_balancedness:
            before, after = plan.balancedness_before, plan.balancedness_after
            self._log.append(f"balancedness {before:.3f}, {after:.3f} if rearranged")
        objection = self.books.objection(plan, self.eplb_config)
        return self.apply(plan, now, why=INTERVAL) if objection is None else self._skip(*objection)

    def _no_plan(self, reason: str) -> list[ForEngine]:
        self._log.append(f"no rearrangement: {reason}")
        return self._skip("policy_failed", reason)

    def _skip(self, reason: str, text: str) -> list[ForEngine]:
        self.books.skipped(self._step, reason, text)
        return []

    def _refresh_shares(self) -> None:
        """Even out the ranks under the newest load, without moving a weight."""
        recent = self.window.load(SHARE_REFRESH_STEPS).sum(axis=1).astype(np.float64)
        if self.placement.num_redundant and recent.any():
            self._ask_shares(recent, self.placement, range(self.placement.num_layers), self.epoch, stage=False)

    def _no_shares(self, asked: SharesQuestion, reason: str, now: float) -> list[ForEngine]:
        """The shares stay as they are; without those of a chunk the rearrangement cannot go on."""
        text = f"the shares of copies were not solved: {reason}"
        if self._now is not None and asked.stage:
            return self._finish(self._now, now, failure=text, reason=UNSOLVED)
        self._log.append(text)
        return self._skip("shares_failed", text)

    def _ask_shares(
        self, load: Floats, placement: Placement, layers: Iterable[int], epoch: int, *, stage: bool
    ) -> None:
        self._inquiry.ask(
            SharesQuestion(
                number=self.next_number(),
                epoch=epoch,
                load_LE=load,
                placement=placement,
                forecast=self._forecast,
                layers=list(layers),
                stage=stage,
                ranks_per_engine=self.topology.tp,
            )
        )

    # -- carrying out --

    def _ask_chunk(self, work: Rearrangement) -> None:
        """The next layers in turn: they are staged once the shares that go with them are known."""
        work.chunk = None
        layers = sorted(work.chunks.pop(0))
        self._ask_shares(self.load(), work.plan.placement, layers, self._next_epoch, stage=True)
        self._next_epoch += 1

    def _committed(self, work: Rearrangement, chunk: Chunk, now: float) -> list[ForEngine]:
        """All engines switched some layers in the same step."""
        table = self.placement.physical_to_logical_LP.copy()
        table[chunk.layers] = work.plan.placement.physical_to_logical_LP[chunk.layers]
        self.placement = Placement(table, self.placement.offsets, self.placement.num_logical)
        self.epoch = chunk.epoch
        self.window.forget_seconds()
        self.books.committed(work, chunk.done.values())
        if work.chunks and not chunk.dropping:
            self._ask_chunk(work)
            return []
        return self._finish(work, now, failure=chunk.dropping if work.chunks else "", reason=chunk.reason)

    def _give_up(self, chunk: Chunk, now: float, reason: str, why: str) -> list[ForEngine]:
        """Ask all engines to drop the chunk; once they have (or have committed it), the rearrangement is over."""
        if chunk.dropping:
            return []
        chunk.dropping, chunk.reason, chunk.last_news = why, reason, now
        self._log.append(f"giving up epoch {chunk.epoch} of a rearrangement: {why}")
        return self._all(DropStage(chunk.epoch))

    def _finish(self, work: Rearrangement, now: float, *, failure: str, reason: str) -> list[ForEngine]:
        """Book a rearrangement that is over, wholly or after some of its chunks."""
        self._now = None
        if work.why == ROLLBACK:
            self._previous = self._previous[:-1] if not failure else self._previous
        elif work.num_chunks:
            self._previous = [*self._previous, work.before][-MAX_HISTORY:]
        self._log.append(self.books.ended(work, self.epoch, now, failure=failure, reason=reason))
        return []

    # -- small things --

    def _all(self, order: Order) -> list[ForEngine]:
        return [ForEngine(dp, order) for dp in range(self.topology.dp)]
