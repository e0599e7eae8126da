"""Whether a planned rearrangement pays: its gain in the time of a step against what moving costs. Pure.

All shares are of the time of a step, as it is now.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from moe_serve.base.eplb_config import EPLBConfig
from moe_serve.eplb.rearrangement import Proposal

ASSUMED_EXPERT_SHARE = 0.3
"""What the slowest ranks' experts take of a step where nobody measures it."""
SURE_ERRORS = 1.5
"""A gain of fewer standard errors pays nothing: one burst in the window, or chance in one of ten, looks so."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """`gain` is expected, give or take `noise` (one standard error), at a `cost` spread over the next interval.

    `expert_share` is what the slowest ranks' experts take; `weight_rows` as in Saving.
    """

    balancedness_after: float
    expert_share: float
    weight_rows: float
    gain: float
    noise: float
    cost: float

    @property
    def net(self) -> float:
        return self.gain - self.cost

    def document(self) -> dict[str, object]:
        """As plain JSON values."""
        return {**asdict(self), "net": self.net}


def judge(plan: Proposal, *, bytes_per_second: float, step_interval: int) -> Judgement:
    """What a plan that has a saving is expected to bring until the next one may come.

    `bytes_per_second` at which moving holds up serving.
    """
    saving = plan.saving
    assert saving is not None
    step, measured = saving.step_seconds, saving.before * saving.row_seconds
    # The sum of the layers' slowest is a model and may be more than was measured.
    share = min(measured / step, 1.0) if measured and step else ASSUMED_EXPERT_SHARE
    per_row = share / saving.before if saving.before else 0.0
    return Judgement(
        balancedness_after=plan.balancedness_after,
        expert_share=share,
        weight_rows=saving.weight_rows,
        gain=saving.rows * per_row,
        noise=saving.noise * per_row,
        cost=plan.num_bytes / bytes_per_second / (step * step_interval) if step else 0.0,
    )


def objection(plan: Proposal, judged: Judgement, eplb_config: EPLBConfig) -> tuple[str, str] | None:
    """Why a plan is not carried out, in one word and in a sentence; None if it is."""
    if not plan.chunks:
        return "no_moves", "the policy keeps everything where it is"
    if not eplb_config.min_gain:
        return None
    would = f"save {judged.gain:.2%}" if judged.gain >= 0 else f"lose {-judged.gain:.2%}"
    what = f"moving {plan.num_moves} experts would {would} of the time of a step"
    if 0 < judged.gain <= SURE_ERRORS * judged.noise:
        return "within_noise", f"{what}, give or take {judged.noise:.2%}: that may be chance"
    if judged.net >= eplb_config.min_gain:
        return None
    return (
        "small_gain",
        f"{what} and cost {judged.cost:.2%} over the next {eplb_config.step_interval} steps; what is left is less than "
        f"min_gain ({eplb_config.min_gain:.2%}). Experts take {judged.expert_share:.1%} of a step",
    )
