"""Data-parallel ranks that are each an LLM in a process of its own, with prompts of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_parity import NUM_TOKENS, Checkpoint, make_checkpoint
from tests.support.launched import Job, Processes, dp_variables

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]

GREEDY: dict[str, object] = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
TOKEN = {"MOE_SERVE_WORLD_TOKEN": "a token of sixteen characters or more"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("parts", [(slice(0, 1), slice(1, None)), (slice(0, None), slice(0, 0))], ids=["1:n", "n:0"])
def test_ranks_with_uneven_prompts_all_end_with_the_right_answers(
    checkpoint: Checkpoint, tmp_path: Path, tp: int, parts: tuple[slice, slice]
) -> None:
    job = Job(
        model=str(checkpoint.folder),
        options={"dtype": "float32", "enable_expert_parallel": True, "tensor_parallel_size": tp},
        prompts=[checkpoint.prompts[part] for part in parts],
        sampling=GREEDY,
        calls=2,
    )
    told = [variables | (TOKEN if tp > 1 else {}) for variables in dp_variables(2)]
    with Processes(job, tmp_path, told) as processes:
        outcome = processes.wait()
    assert outcome.code == 0, outcome.output
    assert outcome.answers == {rank: [checkpoint.answers[part]] * 2 for rank, part in enumerate(parts)}


def test_places_may_be_given_as_options(checkpoint: Checkpoint, tmp_path: Path) -> None:
    port = int(dp_variables(2)[0]["MOE_SERVE_DP_MASTER_PORT"])
    job = Job(
        model=str(checkpoint.folder),
        options={"dtype": "float32", "data_parallel_size": 2, "data_parallel_master_port": port},
        options_of={str(rank): {"data_parallel_rank": rank} for rank in range(2)},
        prompts=[checkpoint.prompts[:2], checkpoint.prompts[2:]],
        sampling=GREEDY,
    )
    with Processes(job, tmp_path, [{}, {}]) as processes:
        outcome = processes.wait()
    assert outcome.code == 0, outcome.output
    assert outcome.answers == {0: [checkpoint.answers[:2]], 1: [checkpoint.answers[2:]]}


def test_workers_need_a_secret_where_ranks_are_started_apart(checkpoint: Checkpoint, tmp_path: Path) -> None:
    job = Job(
        model=str(checkpoint.folder),
        options={"dtype": "float32", "tensor_parallel_size": 2},
        prompts=[checkpoint.prompts] * 2,
        sampling=GREEDY,
    )
    with Processes(job, tmp_path, dp_variables(2)) as processes:
        outcome = processes.wait()
        assert [process.returncode for process in processes.started] == [2, 2]
    assert "openssl rand -hex 16" in outcome.output


def test_a_rank_that_never_comes_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    job = Job(
        model=str(checkpoint.folder),
        options={"dtype": "float32", "start_timeout_seconds": 3},
        prompts=[checkpoint.prompts] * 3,
        sampling=GREEDY,
    )
    with Processes(job, tmp_path, dp_variables(3)[:2]) as processes:
        outcome = processes.wait(60)
    assert outcome.code == 1
    assert "waited 3 s for rank 2" in outcome.output
