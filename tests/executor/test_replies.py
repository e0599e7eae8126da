"""One reply out of those of all workers: whose tokens count, and how far a stage is."""

from __future__ import annotations

import pytest

from moe_serve.base.commands import Sampled, StageStatus, StepResult
from moe_serve.executor.replies import combine_replies


@pytest.mark.parametrize("sampling_worker", [0, 2])
def test_the_tokens_are_those_of_the_worker_that_samples(sampling_worker: int) -> None:
    replies = [StepResult(step=3, sampled=[Sampled("a", worker)]) for worker in range(4)]
    assert combine_replies(replies, sampling_worker=sampling_worker) == replies[sampling_worker]


def test_rows_of_padding_are_those_of_all_workers_together() -> None:
    replies = [StepResult(step=3, padding_rows=worker) for worker in range(4)]
    assert combine_replies(replies, sampling_worker=2) == StepResult(step=3, padding_rows=6)


def test_the_load_of_all_layers_is_that_of_the_pipeline_stages_one_after_the_other() -> None:
    replies = [StepResult(step=3, load=load) for load in (b"first", b"", b"second", b"")]
    assert combine_replies(replies, sampling_worker=2) == StepResult(step=3, load=b"firstsecond")


def test_what_experts_took_is_added_up_over_the_stages_or_not_known() -> None:
    def combined(*stages: list[float]) -> list[float]:
        replies = [StepResult(step=3, load=b"of a stage", expert_seconds=seconds) for seconds in stages]
        reply = combine_replies([*replies, StepResult(step=3)], sampling_worker=2)
        assert isinstance(reply, StepResult)
        return reply.expert_seconds

    assert combined([1.0, 2.0], [0.5, 0.25]) == [1.5, 2.25]
    assert combined([1.0, 2.0], []) == []
    assert combined([], []) == []


def test_a_stage_is_as_far_as_the_last_worker_whoever_samples() -> None:
    stages = [StageStatus(epoch=1, staged=worker != 1, bytes_received=5) for worker in range(4)]
    combined = StageStatus(epoch=1, staged=False, bytes_received=20)
    assert combine_replies(stages, sampling_worker=2) == combined
    results = [StepResult(step=3, sampled=[Sampled("a", worker)], stage=stages[worker]) for worker in range(4)]
    assert combine_replies(results, sampling_worker=2) == StepResult(step=3, sampled=[Sampled("a", 2)], stage=combined)
