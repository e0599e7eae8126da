"""What a process that somebody else started was told, and what is refused before anything is opened."""

from __future__ import annotations

from typing import Any

import pytest

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.launched import LaunchedProcess, launched_process, with_spmd_variables
from moe_serve.base.topology import Topology

TOLD = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SIZES = {"data_parallel_size": 2, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}


def told(environment: dict[str, str], **options: Any) -> LaunchedProcess | None:
    return launched_process(Config.from_flat(options).parallel, environment)


def external(environment: dict[str, str], **options: Any) -> LaunchedProcess:
    found = told(environment, **{**SIZES, "distributed_executor_backend": "external_launcher", **options})
    assert found is not None
    return found


def test_who_starts_its_ranks_itself_was_told_nothing() -> None:
    assert told(TOLD, **SIZES) is None
    assert told({}, data_parallel_rank=0) is None, "a world of one"


def test_torchrun_tells_the_rank_and_its_engine_follows() -> None:
    process = external(TOLD)
    assert (process.number, process.size, process.host, process.port) == (5, 8, "10.0.0.1", 29500)
    topology = Topology(dp=2, pp=2, tp=2)
    assert process.dp_rank(topology) == 1
    assert process.engine_processes(topology) == range(4, 8)
    assert process.voters(topology) == (1, 5)


def test_the_store_of_torchruns_agent_is_used_and_without_one_rank_0_opens_it() -> None:
    assert not external(TOLD | {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}).opens_store
    assert external(TOLD | {"RANK": "0"}).opens_store
    assert not external(TOLD).opens_store


def test_an_attempt_after_a_restart_is_another_run() -> None:
    first, second = (external(TOLD | {"TORCHELASTIC_RESTART_COUNT": count}).run for count in "01")
    assert first != second


@pytest.mark.parametrize(
    ("environment", "options", "sentence"),
    [
        (
            {},
            {},
            "no RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start them by `torchrun --nproc-per-node 8",
        ),
        (TOLD | {"WORLD_SIZE": "4", "RANK": "1"}, {}, "started 4 processes .* is 2 x 2 x 2 = 8"),
        (TOLD | {"RANK": "8"}, {}, r"RANK=8 must lie in \[0, 8\)"),
        (TOLD | {"RANK": "one"}, {}, "RANK='one' must be a whole number"),
        (TOLD | {"MASTER_PORT": "0"}, {}, "MASTER_PORT=0 is no port .*--standalone"),
        (TOLD, {"data_parallel_rank": 1}, "data_parallel_rank: .* leave that out"),
        (TOLD, {"enable_eplb": True, "enable_expert_parallel": True}, "enable_eplb needs the coordinator"),
    ],
)
def test_what_is_missing_or_contradicts_is_one_sentence(
    environment: dict[str, str], options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        external(environment, **options)


def test_a_dp_rank_of_its_own_votes_with_all_others() -> None:
    process = told({}, data_parallel_size=4, data_parallel_rank=2, data_parallel_master_port=29600)
    assert process is not None
    topology = Topology(dp=4, tp=2)
    assert process.dp_rank(topology) == 2
    assert process.engine_processes(topology) == range(2, 3)
    assert process.voters(topology) == (0, 1, 2, 3)


def test_a_dp_rank_of_its_own_needs_a_port_to_meet_at() -> None:
    with pytest.raises(ConfigError, match="MOE_SERVE_DP_MASTER_PORT"):
        told({}, data_parallel_size=4, data_parallel_rank=2)


def test_variables_stand_for_options_and_must_not_contradict_them() -> None:
    variables = {"MOE_SERVE_DP_SIZE": "2", "MOE_SERVE_DP_RANK": "1", "MOE_SERVE_DP_MASTER_PORT": "29600"}
    options = with_spmd_variables({"data_parallel_size": 2}, variables)
    parallel = Config.from_flat(options).parallel
    assert (parallel.data_parallel_size, parallel.data_parallel_rank, parallel.data_parallel_master_port) == (
        2,
        1,
        29600,
    )
    with pytest.raises(ConfigError, match="MOE_SERVE_DP_RANK=1 contradicts data_parallel_rank=0"):
        with_spmd_variables({"data_parallel_rank": 0}, variables)
    with pytest.raises(ConfigError, match="no MOE_SERVE_DP_RANK"):
        with_spmd_variables({}, {"MOE_SERVE_DP_SIZE": "2"})
