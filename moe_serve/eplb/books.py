"""What rearrangements brought and cost: totals for the metrics, a history for people, and what the next would cost.

A Rebalancer tells it what happened, and asks it what is to be said against a plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from moe_serve.base.balance_messages import StageReport
from moe_serve.base.eplb_config import EPLBConfig
from moe_serve.eplb.gate import Judgement, judge, objection
from moe_serve.eplb.rearrangement import Proposal, Rearrangement

MOVE_BYTES_PER_SECOND = 0.5e9
"""How fast experts move while serving waits, until that has been measured."""
INTERVAL = "interval"
MAX_HISTORY = 200


@dataclass(slots=True)
class Totals:
    """For the metrics; they only grow."""

    rebalances: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    moved_experts: int = 0
    moved_bytes: int = 0
    stage_seconds: list[float] = field(default_factory=list)
    commit_seconds: list[float] = field(default_factory=list)
    busy_seconds: float = 0.0
    """Between steps, for moving; the slowest rank's. Serving waits."""
    last_success: float = 0.0
    """Unix time."""


class Books:
    """`history` the last entries, oldest first; `unix_time` is what the metrics tell of the last success."""

    def __init__(self, unix_time: Callable[[], float]) -> None:
        self.history: list[dict[str, object]] = []
        self.totals = Totals()
        self.judged: Judgement | None = None
        self._unix_time = unix_time

    def bytes_per_second(self) -> float:
        """At what speed moving holds up serving, by what was heard so far."""
        moved, seconds = self.totals.moved_bytes, self.totals.busy_seconds + sum(self.totals.commit_seconds)
        return moved / seconds if moved and seconds else MOVE_BYTES_PER_SECOND

    def objection(self, plan: Proposal, eplb_config: EPLBConfig) -> tuple[str, str] | None:
        """Why a plan is not carried out, in one word and in a sentence; None if it is."""
        self.judged = judge(plan, bytes_per_second=self.bytes_per_second(), step_interval=eplb_config.step_interval)
        return objection(plan, self.judged, eplb_config)

    def skipped(self, step: int, reason: str, text: str) -> None:
        """An interval was over and nothing was moved; `reason` in one word, for the metrics."""
        self.totals.skipped[reason] += 1
        self._remember({"step": step, "skipped": reason, "text": text})

    def committed(self, work: Rearrangement, reports: Collection[StageReport]) -> None:
        """A chunk is in use everywhere: serving waited for the slowest engine."""
        self.totals.stage_seconds.append(max(report.stage_seconds for report in reports))
        self.totals.commit_seconds.append(max(report.commit_seconds for report in reports))
        self.totals.busy_seconds += max(report.busy_seconds for report in reports)
        assert work.chunk is not None
        work.num_chunks += 1
        work.num_moves += sum(work.plan.moves_of_layers[layer] for layer in work.chunk.layers)
        work.stage_seconds += self.totals.stage_seconds[-1]
        work.commit_seconds += self.totals.commit_seconds[-1]
        work.bytes_received += sum(report.bytes_received for report in reports)

    def ended(self, work: Rearrangement, epoch: int, now: float, *, failure: str = "", reason: str = "") -> str:
        """A rearrangement is over, with a `failure` perhaps after some of its chunks; the line that says so.

        `reason` is the failure in one word, for the metrics.
        """
        self.totals.moved_experts += work.num_moves
        self.totals.moved_bytes += work.bytes_received
        if failure:
            self.totals.skipped[reason] += 1
        else:
            self.totals.rebalances += 1
            self.totals.last_success = self._unix_time()
        judged = {"judgement": self.judged.document()} if work.why == INTERVAL and self.judged is not None else {}
        self._remember(_entry(work, epoch, now, failure) | judged)
        return (
            f"rearrangement ({work.why}) {'given up' if failure else 'done'}: {work.num_moves} experts, "
            f"{work.bytes_received / 2**20:.1f} MiB in {now - work.started:.2f} s, "
            f"balancedness {work.plan.balancedness_before:.3f} -> {work.plan.balancedness_after:.3f} predicted"
        )

    def _remember(self, entry: dict[str, object]) -> None:
        self.history = [*self.history, entry][-MAX_HISTORY:]


def _entry(work: Rearrangement, epoch: int, now: float, failure: str) -> dict[str, object]:
    return {
        "step": work.step,
        "why": work.why,
        "failure": failure,
        "epoch": epoch,
        "moved_experts": work.num_moves,
        "moved_bytes": work.bytes_received,
        "seconds": now - work.started,
        "stage_seconds": work.stage_seconds,
        "commit_seconds": work.commit_seconds,
        "balancedness_before": work.plan.balancedness_before,
        "balancedness_predicted": work.plan.balancedness_after,
        "gain": work.plan.gain,
    }
