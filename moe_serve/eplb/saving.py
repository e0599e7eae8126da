"""How much of a step another placement would save: a pure model, with what was measured put in.

All ranks wait for the slowest in every layer. What a rank's experts cost there is counted in rows: each row is one, and
an expert that has any row at all costs its weights once more, which are worth `weight_rows` rows. In one step a rank
has not the window's mean but draws around it, and waiting is for the largest draw: where a step brings few rows, chance
makes a slowest rank whatever the placement. Rows are taken to arrive independently (Poisson), which they hardly do:
the real draws are wider, and the saving is rather less.

Shape letters: L layers, E logical experts, P physical slots, R expert-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_serve.eplb.policies.base import Floats
from moe_serve.eplb.search.scores import sum_by_rank

USUAL_WEIGHT_ROWS = 16.0
"""Rows that an expert's weights are worth, where the window does not tell: about what two-core machines showed."""
USUAL_COUNTS = 0.1
"""How much that is believed beside measurements: as one of a rank whose rows and experts differ by a third."""
MOST_WEIGHT_SHARE = 0.95
GRID_POINTS = 48
SIGMAS_BELOW, SIGMAS_ABOVE = 4.0, 5.0


@dataclass(frozen=True, slots=True)
class WindowPart:
    """A part of the window: `load_LE` float64 rows of all its steps, which took `step_seconds`; 0 if not known.

    `expert_seconds_R` what each rank's experts took in all of its layers and steps; empty if that is not known.
    """

    steps: int
    load_LE: Floats
    step_seconds: float
    expert_seconds_R: list[float]


@dataclass(frozen=True, slots=True)
class Saving:
    """What the slowest ranks cost in one step, all layers together, counted in rows, with one placement and another.

    `noise` is the standard error of `before - after` over the parts of the window; `row_seconds` of one row and
    `step_seconds` of a whole step, 0 if not measured.
    """

    before: float
    after: float
    noise: float
    weight_rows: float
    row_seconds: float
    step_seconds: float

    @property
    def rows(self) -> float:
        return self.before - self.after

    @property
    def share(self) -> float:
        """Of the time that the slowest ranks' experts take."""
        return self.rows / self.before if self.before else 0.0


@dataclass(frozen=True, slots=True)
class Slots:
    """Rows of each slot in one step of a part, float64 (L, P), and which slots are whose."""

    rows_LP: Floats
    offsets: tuple[int, ...]

    def used_LP(self) -> Floats:
        """The chance that a slot has a row in a step."""
        used: Floats = -np.expm1(-self.rows_LP)
        return used

    def of_ranks(self) -> tuple[Floats, Floats]:
        """Rows and used experts of each rank in a step, all layers together: float64 (R,) twice."""
        rows_R, used_R = (sum_by_rank(each, self.offsets).sum(axis=0) for each in (self.rows_LP, self.used_LP()))
        return rows_R, used_R

    def slowest(self, weight_rows: float) -> float:
        """The expected cost of the slowest rank in one step, summed over the layers, in rows."""
        used_LP = self.used_LP()
        idle_LP = 1.0 - used_LP
        mean_LP = self.rows_LP + weight_rows * used_LP
        # Of N + w [N > 0], N being Poisson.
        variance_LP = self.rows_LP * (1.0 + 2.0 * weight_rows * idle_LP) + weight_rows**2 * used_LP * idle_LP
        mean_LR, variance_LR = sum_by_rank(mean_LP, self.offsets), sum_by_rank(variance_LP, self.offsets)
        return float(expected_largest(mean_LR, np.sqrt(variance_LR)).sum())


def saving_of(parts: Sequence[WindowPart], before: Sequence[Slots], after: Sequence[Slots]) -> Saving:
    """From the served placement, with which the parts were measured, to another; a Slots for each part, of both."""
    weight_rows = weight_rows_of(parts, before)
    costs = np.array(
        [(old.slowest(weight_rows), new.slowest(weight_rows)) for old, new in zip(before, after, strict=True)]
    )
    steps = np.array([part.steps for part in parts], dtype=np.float64)
    mean_before, mean_after = (costs * steps[:, None]).sum(axis=0) / steps.sum()
    falls = costs[:, 0] - costs[:, 1]
    noise = float(falls.std(ddof=1)) / math.sqrt(len(falls)) if len(falls) > 1 else 0.0
    return Saving(
        before=float(mean_before),
        after=float(mean_after),
        noise=noise,
        weight_rows=weight_rows,
        row_seconds=_row_seconds(parts, before, weight_rows),
        step_seconds=_step_seconds(parts),
    )


def weight_rows_of(parts: Sequence[WindowPart], slots: Sequence[Slots]) -> float:
    """What an expert's weights are worth, by how the ranks' seconds differ when rows and used experts do so otherwise.

    Ranks are compared within a part only, so it does not matter that a machine is slower at times. Where ranks are
    alike nothing can be told, and USUAL_WEIGHT_ROWS holds.
    """
    sums = [each.of_ranks() for each in slots]
    rows = sum(part.steps * rows_R.sum() for part, (rows_R, _) in zip(parts, sums, strict=True))
    used = sum(part.steps * used_R.sum() for part, (_, used_R) in zip(parts, sums, strict=True))
    if not rows:
        return USUAL_WEIGHT_ROWS
    usual = USUAL_WEIGHT_ROWS * used / (rows + USUAL_WEIGHT_ROWS * used)
    above, below = USUAL_COUNTS * usual, USUAL_COUNTS
    for part, (rows_R, used_R) in zip(parts, sums, strict=True):
        seconds_R = np.array(part.expert_seconds_R)
        if seconds_R.any() and rows_R.any():
            seconds_R, rows_R, used_R = (each / each.mean() for each in (seconds_R, rows_R, used_R))
            above += float((used_R - rows_R) @ (seconds_R - rows_R))
            below += float((used_R - rows_R) @ (used_R - rows_R))
    share = min(max(above / below, 0.0), MOST_WEIGHT_SHARE)
    return float(share / (1.0 - share) * rows / used)


def _row_seconds(parts: Sequence[WindowPart], slots: Sequence[Slots], weight_rows: float) -> float:
    seconds = rows = 0.0
    for part, each in zip(parts, slots, strict=True):
        if any(part.expert_seconds_R):
            rows_R, used_R = each.of_ranks()
            seconds += sum(part.expert_seconds_R)
            rows += part.steps * float((rows_R + weight_rows * used_R).sum())
    return seconds / rows if rows else 0.0


def _step_seconds(parts: Sequence[WindowPart]) -> float:
    """Of the parts in which experts were timed, if there are any: what they take is compared with it."""
    timed = [part for part in parts if any(part.expert_seconds_R)] or parts
    return sum(part.step_seconds for part in timed) / sum(part.steps for part in timed)


def expected_largest(mean_XR: Floats, deviation_XR: Floats) -> Floats:
    """float64 (X,): the mean of the largest of R independent normal numbers."""
    low_X = (mean_XR - SIGMAS_BELOW * deviation_XR).max(axis=-1)
    high_X = (mean_XR + SIGMAS_ABOVE * deviation_XR).max(axis=-1)
    smallest_XR = np.maximum(deviation_XR, 1e-12 * (1.0 + np.abs(mean_XR)))
    total_X = np.zeros_like(low_X)
    for point in range(GRID_POINTS + 1):
        at_X = low_X + (high_X - low_X) * (point / GRID_POINTS)
        all_below_X = np.exp(_log_below((at_X[:, None] - mean_XR) / smallest_XR).sum(axis=-1))
        total_X += (1.0 - all_below_X) * (0.5 if point in (0, GRID_POINTS) else 1.0)
    largest: Floats = low_X + total_X * (high_X - low_X) / GRID_POINTS
    return largest


def _log_below(sigmas: Floats) -> Floats:
    """The logarithm of the normal distribution function, by a logistic one that is within 2e-4 of it."""
    sigmas = np.clip(sigmas, -30.0, 30.0)
    below: Floats = -np.logaddexp(0.0, -sigmas * (1.5976 + 0.07056 * sigmas**2))
    return below
