"""One reply out of those of all an engine's workers."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from moe_serve.base.commands import Reply, StageStatus, StepResult, WorkerFacts


def combine_replies(replies: Sequence[Reply], *, sampling_worker: int) -> Reply:
    """What the worker that samples answers, but rows of padding are added up, the loads of the pipeline stages' layers
    are put together, and a stage of experts is as far as the last of the workers.

    `replies` by worker index.
    """
    told = replies[sampling_worker]
    if isinstance(told, StepResult):
        results = [reply for reply in replies if isinstance(reply, StepResult)]
        stages = [result.stage for result in results if result.stage is not None]
        return msgspec.structs.replace(
            told,
            padding_rows=sum(result.padding_rows for result in results),
            load=b"".join(result.load for result in results),
            expert_seconds=_added([result.expert_seconds for result in results if result.load]),
            stage=_combine_stages(stages, len(replies)) if stages else told.stage,
            commit_seconds=max(result.commit_seconds for result in results),
        )
    if isinstance(told, StageStatus):
        return _combine_stages([reply for reply in replies if isinstance(reply, StageStatus)], len(replies))
    return told


def _combine_stages(stages: list[StageStatus], num_workers: int) -> StageStatus:
    return StageStatus(
        epoch=max(stage.epoch for stage in stages),
        staged=len(stages) == num_workers and all(stage.staged for stage in stages),
        failed=next((stage.failed for stage in stages if stage.failed), ""),
        pieces_posted=max(stage.pieces_posted for stage in stages),
        bytes_received=sum(stage.bytes_received for stage in stages),
        seconds=max(stage.seconds for stage in stages),
        busy_seconds=max(stage.busy_seconds for stage in stages),
    )


def _added(of_stages: Sequence[Sequence[float]]) -> list[float]:
    """By rank of a stage; nothing unless all stages know it."""
    return [sum(each) for each in zip(*of_stages, strict=True)] if all(of_stages) else []


def combine_facts(replies: Sequence[Reply], *, start_seconds: float) -> WorkerFacts:
    """The least blocks, the sum of bytes held and read, the longest seconds. The checkpoint's size is its own."""
    facts = [reply for reply in replies if isinstance(reply, WorkerFacts)]
    assert len(facts) == len(replies), f"LoadModel was answered with {replies}"
    seconds = {"start the workers": start_seconds}
    for each in facts:
        for phase, value in each.load_seconds.items():
            seconds[phase] = max(seconds.get(phase, 0.0), value)
    return WorkerFacts(
        device=", ".join(dict.fromkeys(each.device for each in facts)),
        dtype=facts[0].dtype,
        kernels=facts[0].kernels,
        all2all=facts[0].all2all,
        tensor_parallel=facts[0].tensor_parallel,
        kv_blocks=min(each.kv_blocks for each in facts),
        kv_block_bytes=sum(each.kv_block_bytes for each in facts),
        weight_bytes=sum(each.weight_bytes for each in facts),
        expert_bytes=max(each.expert_bytes for each in facts),
        checkpoint_bytes_read=sum(each.checkpoint_bytes_read for each in facts),
        checkpoint_bytes_total=max(each.checkpoint_bytes_total for each in facts),
        load_seconds=seconds,
    )
