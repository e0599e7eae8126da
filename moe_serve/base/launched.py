"""A process that somebody else's launcher started as one of several, and what it was told: torchrun, or a script's own.

Both tell by environment variables: torchrun by torch's (RANK, WORLD_SIZE, MASTER_ADDR, ...), offline data parallelism
by MOE_SERVE_DP_*. Pure: the environment is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_serve.base.errors import ConfigError
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.base.topology import Topology

EXTERNAL_LAUNCHER = "external_launcher"
"""Of --distributed-executor-backend."""
TORCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SPMD_VARIABLES = {
    "MOE_SERVE_DP_SIZE": "data_parallel_size",
    "MOE_SERVE_DP_RANK": "data_parallel_rank",
    "MOE_SERVE_DP_RANK_LOCAL": "data_parallel_rank_local",
    "MOE_SERVE_DP_MASTER_IP": "data_parallel_address",
    "MOE_SERVE_DP_MASTER_PORT": "data_parallel_master_port",
}
"""Variable -> the option it stands for."""
OTHERS_CONCERN = {
    "data_parallel_rank",
    "data_parallel_rank_local",
    "data_parallel_start_rank",
    "data_parallel_size_local",
    "data_parallel_address",
    "data_parallel_rpc_port",
    "data_parallel_master_port",
    "data_parallel_external_lb",
    "data_parallel_hybrid_lb",
    "data_parallel_multi_port_external_lb",
    "data_parallel_backend",
    "node_rank",
    "headless",
}
"""Options about who starts which rank and where they meet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedProcess:
    """One of `size` processes, by its `number`. They meet at `host`:`port`, in the store that `opens_store` opens here,
    or that is there already (`store_stands`). `local_number` its place among those of its machine.

    Each holds one rank of the world (`holds_engine` false), or a whole DP rank with all of its workers. `run` tells one
    attempt of a launcher from the next.
    """

    number: int
    size: int
    host: str
    port: int
    local_number: int | None
    store_stands: bool = False
    holds_engine: bool
    run: str = ""

    @property
    def opens_store(self) -> bool:
        return self.number == 0 and not self.store_stands

    def dp_rank(self, topology: Topology) -> int:
        """Which engine this process is, or a rank of."""
        return self.number if self.holds_engine else topology.coordinates(self.number)[0]

    def engine_processes(self, topology: Topology) -> range:
        """Processes that are one engine, this one among them."""
        if self.holds_engine:
            return range(self.number, self.number + 1)
        first = self.dp_rank(topology) * topology.num_workers
        return range(first, first + topology.num_workers)

    def voters(self, topology: Topology) -> tuple[int, ...]:
        """Processes that vote with this one, in order of DP rank: its like in every engine."""
        return tuple(range(self.size)) if self.holds_engine else topology.dp_group(self.number)


def check_served(parallel: ParallelConfig) -> None:
    """ConfigError for options of processes that a server cannot have."""
    if parallel.distributed_executor_backend == EXTERNAL_LAUNCHER:
        raise ConfigError(
            "distributed_executor_backend external_launcher is for LLM in processes that torchrun starts (such as "
            "moe_serve.examples.torchrun); a server starts its ranks itself: leave it out"
        )


def launched_process(parallel: ParallelConfig, environment: Mapping[str, str]) -> LaunchedProcess | None:
    """What this process was told, where its options say that somebody else started it as one of several; else None.

    ConfigError for what was not told, contradicts the options, or cannot be without a coordinator.
    """
    external = parallel.distributed_executor_backend == EXTERNAL_LAUNCHER
    if not external and (parallel.data_parallel_rank is None or parallel.data_parallel_size == 1):
        return None
    if parallel.enable_eplb:
        raise ConfigError(
            "enable_eplb needs the coordinator of a world, which processes that are started one by one do not have; "
            "leave it out, or let one process start all ranks (LLM without data_parallel_rank, moe-serve serve)"
        )
    if not external:
        return _from_options(parallel)
    if given := sorted(OTHERS_CONCERN & parallel.model_fields_set):
        raise ConfigError(
            f"{' and '.join(given)}: with distributed_executor_backend external_launcher the launcher's environment "
            "says which rank a process is and where all meet; leave that out"
        )
    return from_torchrun(parallel.topology, environment)


def from_torchrun(topology: Topology, environment: Mapping[str, str]) -> LaunchedProcess:
    """One process per rank, told by torch's variables (env://)."""
    missing = [name for name in TORCH_VARIABLES if not environment.get(name)]
    if missing:
        raise ConfigError(
            "distributed_executor_backend external_launcher is for processes that torchrun or its like starts, but the "
            f"environment has no {', '.join(missing)}; start them by `torchrun --nproc-per-node "
            f"{topology.world_size} ...`, or choose another --distributed-executor-backend"
        )
    rank, local_rank, size, port = (
        _number(environment, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    )
    if size != topology.world_size:
        raise ConfigError(
            f"the launcher started {size} processes (WORLD_SIZE), but data_parallel_size x pipeline_parallel_size x "
            f"tensor_parallel_size is {topology.dp} x {topology.pp} x {topology.tp} = {topology.world_size}: each rank "
            "is a process, so these must be equal"
        )
    if not port:
        raise ConfigError(
            "MASTER_PORT=0 is no port at which processes can meet; give one (torchrun --master-port), or let torchrun "
            "choose (--standalone)"
        )
    if not rank < size:
        raise ConfigError(f"RANK={rank} must lie in [0, {size}), below WORLD_SIZE")
    return LaunchedProcess(
        number=rank,
        size=size,
        host=environment["MASTER_ADDR"],
        port=port,
        local_number=local_rank,
        store_stands=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        holds_engine=False,
        run=f"{environment.get('TORCHELASTIC_RUN_ID', '')} {environment.get('TORCHELASTIC_RESTART_COUNT', '0')}",
    )


def with_spmd_variables(options: Mapping[str, object], environment: Mapping[str, str]) -> dict[str, object]:
    """Options with what MOE_SERVE_DP_* says beside them; ConfigError where the two differ."""
    told = {option: environment[name] for name, option in SPMD_VARIABLES.items() if environment.get(name)}
    if told and "data_parallel_rank" not in told and "data_parallel_rank" not in options:
        raise ConfigError(
            "the environment has MOE_SERVE_DP_* but no MOE_SERVE_DP_RANK: which data-parallel rank is this process?"
        )
    for name, option in SPMD_VARIABLES.items():
        if option in told and option in options and str(options[option]) != told[option]:
            raise ConfigError(f"{name}={told[option]} contradicts {option}={options[option]!r}; leave one of them out")
    return {**told, **options}


def _from_options(parallel: ParallelConfig) -> LaunchedProcess:
    """One process per DP rank, told by options."""
    rank = parallel.data_parallel_rank
    assert rank is not None
    if not parallel.data_parallel_master_port:
        raise ConfigError(
            f"data_parallel_rank ({rank}) of an LLM needs a port at which the processes of all ranks meet, on "
            f"{parallel.data_parallel_address}: give the same data_parallel_master_port "
            "(MOE_SERVE_DP_MASTER_PORT) to each"
        )
    return LaunchedProcess(
        number=rank,
        size=parallel.data_parallel_size,
        host=parallel.data_parallel_address,
        port=parallel.data_parallel_master_port,
        local_number=parallel.data_parallel_rank_local,
        holds_engine=True,
    )


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        value = int(environment[name])
    except ValueError:
        value = -1
    if value < 0:
        raise ConfigError(f"{name}={environment[name]!r} must be a whole number from 0 on")
    return value
