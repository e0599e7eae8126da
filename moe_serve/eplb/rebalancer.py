"""When experts move, and how a rearrangement goes on: a pure state machine, given loads and news, giving orders.

A rearrangement is a target placement, carried out in chunks of layers. Each chunk is an epoch: every engine stages it,
the votes commit it in one step everywhere, the next chunk follows. A chunk that fails anywhere, or makes no progress
for too long, is given up, and with it the rest; what was committed before stays, and is a whole placement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from moe_serve.base.commands import SetShares, StageExperts
from moe_serve.base.errors import ConfigError, Conflict
from moe_serve.base.messages import DropStage, Record, StageReport, StepLoad
from moe_serve.base.parallel_config import EPLBConfig
from moe_serve.base.topology import Topology
from moe_serve.eplb.books import MAX_HISTORY, Books, Totals
from moe_serve.eplb.forecast import Forecast, cumulative_shares
from moe_serve.eplb.placement import Placement, moves
from moe_serve.eplb.policies.base import Floats, Policy, Problem
from moe_serve.eplb.rearrangement import (
    Chunk,
    ForEngine,
    Order,
    Proposal,
    Rearrangement,
    chunks_of,
)
from moe_serve.eplb.search.weights import Split
from moe_serve.eplb.window import LoadWindow, Recording

STAGE_SECONDS = 60.0
"""A chunk that is neither committed nor dropped after this long without news is given up."""
ROLLBACK = "rollback"
FAILED, SILENT = "stage_failed", "stage_silent"
FIRST_INTERVAL_SHARE = 4
SHARE_REFRESH_STEPS = 50


class Rebalancer:
    """Experts on the ranks and nodes of `topology`; `expert_bytes` of one in one layer, which the workers tell later.

    Times are seconds of any clock, but `unix_time` is what the metrics tell. What it returns are orders for engines;
    it does nothing itself.
    """

    def __init__(
        self,
        eplb_config: EPLBConfig,
        topology: Topology,
        placement: Placement,
        *,
        policy: Policy,
        expert_bytes: int = 0,
        num_nodes: int = 1,
        num_groups: int = 1,
        unix_time: Callable[[], float],
    ) -> None:
        self.eplb_config = eplb_config
        self.topology = topology
        self.placement = placement
        self.num_nodes = num_nodes
        self.epoch = 0
        self.books = Books(unix_time)
        self.recording = Recording()
        self.window = LoadWindow(placement.num_layers, placement.num_logical, eplb_config.window_size)
        self.last_prediction: float | None = None
        self._log: list[str] = []
        self._policy = policy
        self._forecast = Forecast(num_nodes, eplb_config.prefer_local, expert_bytes)
        self._num_groups = num_groups
        self._until_next = max(1, eplb_config.step_interval // FIRST_INTERVAL_SHARE)
        self._since_refresh = 0
        self._step = 0
        self._now: Rearrangement | None = None
        self._previous: list[Placement] = []
        self._last_load_at: float | None = None
        self._next_epoch = 1

    # -- what comes in --

    def set_expert_bytes(self, expert_bytes: int) -> None:
        """What the workers found one expert to take in one layer; said before the first load."""
        self._forecast = replace(self._forecast, expert_bytes=expert_bytes)

    def hear_load(self, load: StepLoad, now: float) -> list[ForEngine]:
        """A bucket of load; perhaps it is time to rearrange, or to split the load over copies anew."""
        counts = self.window.add(load.steps, load.load)
        sends: list[ForEngine] = []
        if self.recording.on and load.steps == 1:
            self.recording.add(counts)
            if self.recording.full:
                self._log.append(f"the recording of expert load is full after {len(self.recording.steps)} steps")
                sends += self._all(Record(on=False))
        if self._last_load_at is not None and load.steps:
            self.books.hear_step_seconds((now - self._last_load_at) / load.steps)
        self._last_load_at, self._step = now, load.step
        self._until_next -= load.steps
        self._since_refresh += load.steps
        if self._now is None and self._until_next <= 0:
            self._until_next = self.eplb_config.step_interval
            return sends + self._consider(now)
        if self._since_refresh >= SHARE_REFRESH_STEPS:
            self._since_refresh = 0
            sends += self._refresh_shares()
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
        return self._finish(self._now, now, failure=chunk.dropping)

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

    # -- what it can be asked --

    def predict(self, placement: Placement) -> Proposal:
        """What a placement would bring under the load of the window; ConfigError if it is of another model or world."""
        return self._forecast.plan(self.load(), self.placement, placement)

    def propose(self, policy: Policy | None = None) -> Proposal:
        """What the policy would do now. ConfigError without any load, and for a policy that does not work."""
        problem = Problem(
            self.load(), self.placement.offsets, self.num_nodes, self._num_groups, self.placement, seed=self._next_epoch
        )
        try:
            placement = (policy or self._policy)(problem)
            placement.check()
        except (ArithmeticError, LookupError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"the policy failed: {type(error).__name__}: {error}") from error
        return self.predict(placement)

    def apply(self, plan: Proposal, now: float, *, why: str) -> list[ForEngine]:
        """Begin a rearrangement; ConfigError while one is under way or if nothing would change."""
        if self._now is not None:
            raise Conflict("a rearrangement is under way; wait until it is done (GET /eplb shows it)")
        chunks = self._chunks(plan)
        if not chunks:
            raise ConfigError("the placement is the one that is served: nothing to do")
        self._now = Rearrangement(plan, self.placement, chunks, now, self._step, why)
        self._until_next = self.eplb_config.step_interval
        return self._next_chunk(self._now, now)

    def rollback(self, now: float) -> list[ForEngine]:
        """Back to the placement before the last rearrangement; ConfigError if there is none."""
        if self._now is None and not self._previous:
            raise Conflict("nothing to roll back to: no rearrangement has been applied")
        if self._now is not None:
            raise Conflict("a rearrangement is under way; wait until it is done (GET /eplb shows it)")
        return self.apply(self.predict(self._previous[-1]), now, why=ROLLBACK)

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

    def rank_loads(self) -> Floats:
        """float64 (L, R): rows each rank computes under the load of the window, with the shares that fit it."""
        return self._forecast.rank_loads(self.load(), self.placement)

    # -- deciding --

    def _consider(self, now: float) -> list[ForEngine]:
        """The interval is over: rearrange, or say why not."""
        if not self.load().any():
            return self._skip("no_load", "no tokens were seen")
        try:
            plan = self.propose()
        except ConfigError as error:
            self._log.append(f"no rearrangement: {error}")
            return self._skip("policy_failed", str(error))
        self.last_prediction = plan.balancedness_after
        if self.eplb_config.log_balancedness:
            self._log.append(
                f"balancedness {plan.balancedness_before:.3f}, {plan.balancedness_after:.3f} if rearranged"
            )
        if not self._chunks(plan):
            return self._skip("no_moves", "the policy keeps everything where it is")
        paid = plan.gain - self.books.cost_share(plan, self.eplb_config.step_interval)
        if self.eplb_config.min_gain and paid < self.eplb_config.min_gain:
            return self._skip(
                "small_gain",
                f"moving {plan.num_moves} experts would save {paid:.2%} of the expert time over the next "
                f"{self.eplb_config.step_interval} steps, less than min_gain ({self.eplb_config.min_gain:.2%})",
            )
        return self.apply(plan, now, why="interval")

    def _skip(self, reason: str, text: str) -> list[ForEngine]:
        self.books.skipped(self._step, reason, text)
        return []

    def _refresh_shares(self) -> list[ForEngine]:
        """Even out the ranks under the newest load, without moving a weight."""
        if not self.placement.num_redundant or self._now is not None:
            return []
        recent = self.window.load(SHARE_REFRESH_STEPS).sum(axis=1).astype(np.float64)
        if not recent.any():
            return []
        split, layers = self._forecast.split(recent, self.placement), list(range(self.placement.num_layers))
        return [
            ForEngine(dp, SetShares(epoch=self.epoch, shares=self._shares(split, dp, layers)))
            for dp in range(self.topology.dp)
        ]

    # -- carrying out --

    def _next_chunk(self, work: Rearrangement, now: float) -> list[ForEngine]:
        layers = sorted(work.chunks.pop(0))
        work.chunk = Chunk(self._next_epoch, layers, now)
        self._next_epoch += 1
        new = work.plan.placement
        rows = {layer: new.physical_to_logical_LP[layer].tolist() for layer in layers}
        split = self._forecast.split(self.load(), new)
        return [
            ForEngine(dp, StageExperts(epoch=work.chunk.epoch, rows=rows, shares=self._shares(split, dp, layers)))
            for dp in range(self.topology.dp)
        ]

    def _committed(self, work: Rearrangement, chunk: Chunk, now: float) -> list[ForEngine]:
        """All engines switched some layers in the same step."""
        table = self.placement.physical_to_logical_LP.copy()
        table[chunk.layers] = work.plan.placement.physical_to_logical_LP[chunk.layers]
        self.placement = Placement(table, self.placement.offsets, self.placement.num_logical)
        self.epoch = chunk.epoch
        self.books.committed(work, chunk.done.values())
        if work.chunks and not chunk.dropping:
            return self._next_chunk(work, now)
        return self._finish(work, now, failure=chunk.dropping if work.chunks else "")

    def _give_up(self, chunk: Chunk, now: float, reason: str, why: str) -> list[ForEngine]:
        """Ask all engines to drop the chunk; once they have (or have committed it), the rearrangement is over."""
        if chunk.dropping:
            return []
        chunk.dropping, chunk.reason, chunk.last_news = why, reason, now
        self._log.append(f"giving up epoch {chunk.epoch} of a rearrangement: {why}")
        return self._all(DropStage(chunk.epoch))

    def _finish(self, work: Rearrangement, now: float, *, failure: str) -> list[ForEngine]:
        """Book a rearrangement that is over, wholly or after some of its chunks."""
        self._now = None
        moved = len(moves(work.before, self.placement))
        if work.why == ROLLBACK:
            self._previous = self._previous[:-1] if not failure else self._previous
        elif work.num_chunks:
            self._previous = [*self._previous, work.before][-MAX_HISTORY:]
        self._log.append(self.books.ended(work, moved, self.epoch, now, failure))
        return []

    # -- small things --

    def _all(self, order: Order) -> list[ForEngine]:
        return [ForEngine(dp, order) for dp in range(self.topology.dp)]

    def _chunks(self, plan: Proposal) -> list[list[int]]:
        return chunks_of(self.placement, plan.placement, self.load(), self._forecast.expert_bytes)

    def _shares(self, split: Split, dp: int, layers: list[int]) -> dict[int, bytes]:
        """The shares of one engine's ranks."""
        return cumulative_shares(split, range(dp * self.topology.tp, (dp + 1) * self.topology.tp), layers)
