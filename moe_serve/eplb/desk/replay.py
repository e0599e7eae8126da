"""What policies and redundancies would have done on a recorded load: plan on one window, score on the next.

Balancedness is per step (mean over steps and layers of mean / max rank load). Nothing is served and no weight moves;
step times are modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import numpy as np

from moe_serve.base.errors import ConfigError
from moe_serve.eplb.desk.loads import Trace
from moe_serve.eplb.desk.plan import cross_node_moves, make_plan
from moe_serve.eplb.placement import Placement, moves
from moe_serve.eplb.policies.base import Floats, check_load, problem_of
from moe_serve.eplb.search.scores import layer_balancedness, mean_of_ratios, rank_loads, slot_loads, sum_by_rank
from moe_serve.eplb.search.weights import solve_split

STEPS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class ReplayWorld:
    """Ranks that share the experts, and what a token and an expert cost them (the model of a step's time).

    A layer takes max over ranks of (row_seconds x tokens + expert_seconds x experts in use); `expert_bytes` is the
    size of one expert's weights in one layer.
    """

    num_ranks: int
    num_nodes: int = 1
    num_groups: int = 1
    expert_bytes: int = 0
    row_seconds: float = 1e-6
    expert_seconds: float = 0.0


@dataclass(slots=True)
class Outcome:
    """One policy at one redundancy; lists have one entry per window planned on (`*_share`, seconds) or scored."""

    policy: str
    num_redundant: int
    balancedness: list[float] = field(default_factory=list)
    balancedness_uneven: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    step_seconds_uneven: list[float] = field(default_factory=list)
    moved_share: list[float] = field(default_factory=list)
    moved_experts: list[int] = field(default_factory=list)
    moved_bytes: list[int] = field(default_factory=list)
    cross_node_moves: list[int] = field(default_factory=list)
    duplicate_slots: list[int] = field(default_factory=list)
    solve_seconds: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """Means over the windows; what was moved without the first placement, which every policy must make once."""
        later = slice(1, None) if len(self.moved_share) > 1 else slice(None)

        def mean(values: Sequence[float]) -> float:
            return float(np.mean(values)) if values else 0.0

        return {
            "policy": self.policy,
            "num_redundant": self.num_redundant,
            "balancedness": mean(self.balancedness),
            "balancedness_uneven": mean(self.balancedness_uneven),
            "step_seconds": mean(self.step_seconds),
            "step_seconds_uneven": mean(self.step_seconds_uneven),
            "moved_share": mean(self.moved_share[later]),
            "moved_experts": mean(self.moved_experts[later]),
            "moved_bytes": mean(self.moved_bytes[later]),
            "cross_node_moves": mean(self.cross_node_moves[later]),
            "duplicate_slots": max(self.duplicate_slots, default=0),
            "solve_seconds": mean(self.solve_seconds),
        }

    def document(self) -> dict[str, object]:
        """Everything, as plain JSON values."""
        return {**asdict(self), "summary": self.summary()}


def replay(
    trace: Trace,
    world: ReplayWorld,
    *,
    policies: Sequence[str],
    redundancies: Sequence[int],
    window_steps: int,
    refresh_steps: int = 24,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Outcome]:
    """Every policy at every redundancy. `refresh_steps`: steps of the scored window that uneven shares are solved from.

    Raises ConfigError for a trace of fewer than two windows, and what planning raises.
    """
    windows = cut(trace, window_steps)
    outcomes = []
    for num_redundant in redundancies:
        for policy in policies:
            progress(f"{policy} with {num_redundant} redundant experts")
            outcomes.append(_replay_one(windows, world, policy, num_redundant, refresh_steps))
    return outcomes


def cut(trace: Trace, window_steps: int) -> list[Floats]:
    """Windows of (steps, L, E); ConfigError for fewer than two."""
    if window_steps < 1:
        raise ConfigError(f"a window must have at least 1 step, not {window_steps}")
    windows = trace.windows(window_steps)
    if len(windows) < 2:
        raise ConfigError(
            f"a trace of {len(trace.count_SLE)} steps holds {len(windows)} windows of {window_steps}; at least 2 are "
            "needed, to plan on one and score on the next (option --window-steps)"
        )
    return windows


def _replay_one(
    windows: Sequence[Floats], world: ReplayWorld, policy: str, num_redundant: int, refresh_steps: int
) -> Outcome:
    outcome = Outcome(policy, num_redundant)
    current: Placement | None = None
    for turn, (seen, scored) in enumerate(pairwise(windows)):
        problem = problem_of(
            check_load(seen.sum(axis=0)),
            num_ranks=world.num_ranks,
            num_redundant=num_redundant,
            num_nodes=world.num_nodes,
            num_groups=world.num_groups,
            current=current,
            seed=turn,
        )
        plan = make_plan(problem, policy)
        made = len(moves(plan.before, plan.after))
        outcome.solve_seconds.append(plan.solve_seconds)
        outcome.moved_experts.append(made)
        outcome.moved_share.append(made / plan.after.physical_to_logical_LP.size)
        outcome.moved_bytes.append(made * world.expert_bytes)
        outcome.cross_node_moves.append(cross_node_moves(plan.before, plan.after, problem.node_sizes))
        outcome.duplicate_slots.append(plan.after.num_duplicates())
        current = plan.after
        balanced, seconds = score_steps(scored, current, world)
        outcome.balancedness.append(balanced)
        outcome.step_seconds.append(seconds)
        recent = scored[: min(refresh_steps, len(scored))].sum(axis=0)
        balanced, seconds = score_steps(scored, current, world, solve_split(current, recent).anywhere_LP)
        outcome.balancedness_uneven.append(balanced)
        outcome.step_seconds_uneven.append(seconds)
    return outcome


def score_steps(
    steps_SLE: Floats, placement: Placement, world: ReplayWorld, shares_LP: Floats | None = None
) -> tuple[float, float]:
    """(balancedness per step, modelled seconds per step) of a placement over some steps."""
    balanced, seconds = [], []
    for at in range(0, len(steps_SLE), STEPS_AT_ONCE):
        slots_SLP = slot_loads(steps_SLE[at : at + STEPS_AT_ONCE], placement, shares_LP)
        rows_SLR = sum_by_rank(slots_SLP, placement.offsets)
        experts_SLR = sum_by_rank((slots_SLP > 0).astype(np.float64), placement.offsets)
        balanced.append(layer_balancedness(rows_SLR).mean(axis=1))
        time_SLR = world.row_seconds * rows_SLR + world.expert_seconds * experts_SLR
        seconds.append(time_SLR.max(axis=2).sum(axis=1))
    return float(np.concatenate(balanced).mean()), float(np.concatenate(seconds).mean())


@dataclass(frozen=True, slots=True)
class Gain:
    """What a number of redundant experts brings, and what the last of them brought. Times are with uneven shares."""

    num_redundant: int
    balancedness: float
    balancedness_uneven: float
    step_seconds: float
    bytes_per_rank: float
    saved_share: float
    """Modelled step time saved beside no redundancy, as a share."""
    marginal_share: float
    """The same beside the next smaller redundancy, per redundant expert."""


def redundancy_curve(outcomes: Sequence[Outcome], world: ReplayWorld, num_layers: int) -> list[Gain]:
    """The marginal gain of redundancy from the outcomes of one policy, smallest redundancy first."""
    gains: list[Gain] = []
    for outcome in sorted(outcomes, key=lambda outcome: outcome.num_redundant):
        seconds = float(np.mean(outcome.step_seconds_uneven))
        first = gains[0].step_seconds if gains else seconds
        more = outcome.num_redundant - gains[-1].num_redundant if gains else 0
        saved = 1 - seconds / first if first else 0.0
        gains.append(
            Gain(
                outcome.num_redundant,
                float(np.mean(outcome.balancedness)),
                float(np.mean(outcome.balancedness_uneven)),
                seconds,
                outcome.num_redundant * num_layers * world.expert_bytes / world.num_ranks,
                saved,
                (saved - gains[-1].saved_share) / more if more else 0.0,
            )
        )
    return gains


def worthwhile(gains: Sequence[Gain], least_share: float) -> int:
    """The largest redundancy of the curve that saves `least_share` of a step per redundant expert over one before it.

    Saving is counted from the best smaller choice, so that a dip in a noisy curve does not end the search.
    """
    chosen = gains[0]
    for gain in gains[1:]:
        if gain.saved_share - chosen.saved_share >= least_share * (gain.num_redundant - chosen.num_redundant):
            chosen = gain
    return chosen.num_redundant


def balancedness_of_start(windows: Sequence[Floats], world: ReplayWorld) -> float:
    """Balancedness of the linear placement without redundancy: what there is to gain."""
    load_LE = sum(window.sum(axis=0) for window in windows)
    problem = problem_of(np.asarray(load_LE), num_ranks=world.num_ranks)
    return mean_of_ratios(rank_loads(np.concatenate(list(windows)), problem.start()))
