"""Which steps an engine would cut in two, and that all cut the same ones."""

from __future__ import annotations

import pytest

from moe_serve.base.commands import Scheduled, StepPlan
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.engine.halving import Thresholds
from moe_serve.engine.lockstep import Vote, decide


def plan(*tokens: int) -> StepPlan:
    parts = [Scheduled(request_id=str(index), start=0, num_tokens=count) for index, count in enumerate(tokens)]
    return StepPlan(step=1, scheduled=parts, tokens_by_dp_rank=[sum(tokens)])


@pytest.mark.parametrize(
    ("tokens", "decode", "prefill", "wants"),
    [
        ([1] * 8, 8, 100, True),
        ([1] * 7, 8, 100, False),
        ([1] * 7 + [2], 8, 100, False),
        ([1] * 7 + [93], 8, 100, True),
        ([1], 1, 1, False),  # nothing to cut
        ([2], 1, 1, True),
        ([], 1, 1, False),
    ],
    ids=str,
)
def test_a_step_is_cut_from_its_kinds_threshold_on(tokens: list[int], decode: int, prefill: int, wants: bool) -> None:
    options = {"dbo_decode_token_threshold": decode, "dbo_prefill_token_threshold": prefill}
    asked = ParallelConfig(data_parallel_size=2, enable_dbo=True, **options)  # type: ignore[arg-type]
    assert Thresholds.of(asked).wants_halves(plan(*tokens)) == wants
    assert not Thresholds.of(ParallelConfig(**options)).wants_halves(plan(*tokens))  # type: ignore[arg-type]


def test_a_step_is_cut_if_every_engine_says_so() -> None:
    yes, no = (Vote(1, 0, True, 8, in_halves=each) for each in (True, False))
    assert decide([yes, yes]).in_halves
    assert not decide([yes, no]).in_halves
