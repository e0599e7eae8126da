"""The Ray that surrounds this process, looked up among what is imported already: nothing here imports Ray."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_serve.base.errors import ConfigError, MissingExtra
from moe_serve.base.interpreter import HOME
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.executor.ray_placement import parse_indices

OPTIONS = ("ray_address", "ray_placement_group", "ray_bundle_indices", "ray_runtime_env", "ray_workers_use_nsight")
NSIGHT = {"t": "cuda,cudnn,cublas", "o": "'worker_process_%p'", "cuda-graph-trace": "node"}
"""Options of nsys for an actor that computes: what it traces, one report for each process."""
PLACED_BY_HAND = (
    "data_parallel_rank",
    "data_parallel_rank_local",
    "data_parallel_start_rank",
    "node_rank",
    "headless",
    "data_parallel_external_lb",
    "data_parallel_hybrid_lb",
    "data_parallel_multi_port_external_lb",
)
"""Options for ranks that are started by several commands, or have servers of their own."""
PREFIXES = ("HF_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "GOMP_")
NAMES = {"HUGGING_FACE_HUB_TOKEN", "OMP_WAIT_POLICY", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING"}
INSTALLED = {"site-packages", "dist-packages"}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The cluster that this process is connected to, and the placement group it was placed in (hexadecimal)."""

    address: str = ""
    placement_group: str = ""


def surroundings() -> Surroundings:
    """Empty where Ray was not imported or not initialised."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return Surroundings()
    context = ray.get_runtime_context()
    return Surroundings(context.gcs_address, context.get_placement_group_id() or "")


def settle_ray(parallel: ParallelConfig, around: Surroundings) -> dict[str, object]:
    """Options of Ray as they will be run in other processes. MissingExtra or ConfigError for what cannot be."""
    option = "data-parallel" if parallel.data_parallel_backend == "ray" else "distributed-executor"
    check_installed(f"--{option}-backend ray", "or choose mp")
    if "://" in (told := parallel.ray_address or os.environ.get("RAY_ADDRESS", "")):
        raise ConfigError(
            f"ray_address {told!r} is an address for Ray's client, which cannot hold workers; give HOST:PORT of the "
            "cluster (option --ray-address, or RAY_ADDRESS)"
        )
    variables = (parallel.ray_runtime_env or {}).get("env_vars", {})
    if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
        raise ConfigError(
            f"ray_runtime_env cannot be: its env_vars are {variables!r}, not names and their texts (option "
            "--ray-runtime-env)"
        )
    if parallel.ray_workers_use_nsight:
        _check_nsight(parallel)
    if parallel.ray_bundle_indices is not None:
        parse_indices(parallel.ray_bundle_indices, count=parallel.world_size_across_dp)
    same = parallel.ray_address in (None, around.address)
    group = parallel.ray_placement_group or (around.placement_group if same else "")
    if parallel.ray_bundle_indices is not None and not group:
        raise ConfigError(
            f"ray_bundle_indices {parallel.ray_bundle_indices!r} needs a placement group: start this inside one, or "
            "give --ray-placement-group"
        )
    return {"ray_address": parallel.ray_address or around.address or None, "ray_placement_group": group or None}


def check_installed(what: str, else_: str) -> None:
    """MissingExtra without Ray, which `what` needs."""
    if importlib.util.find_spec("ray") is None:
        raise MissingExtra(
            f"{what} needs the Python package 'ray', which is not installed here; pip install 'moe-serve[ray]', {else_}"
        )


def check_ray_engines(parallel: ParallelConfig, executor: str) -> None:
    """ConfigError for what does not go with engines that Ray starts; `executor` is theirs."""
    if parallel.data_parallel_size == 1:
        raise ConfigError(
            "data_parallel_backend ray needs data_parallel_size > 1; the workers of one engine are placed by "
            "--distributed-executor-backend ray"
        )
    if given := sorted(name for name in PLACED_BY_HAND if getattr(parallel, name) not in (None, False)):
        raise ConfigError(
            f"{' and '.join(given)}: with data_parallel_backend ray one command starts all engines and one server; "
            "leave that out (data_parallel_size_local says how many engines a node gets)"
        )
    if parallel.data_parallel_size_local is not None and parallel.ray_bundle_indices is not None:
        raise ConfigError(
            "data_parallel_size_local and ray_bundle_indices both say where engines go; leave out one of them"
        )
    if executor != ("uni" if parallel.world_size == 1 else "ray"):
        raise ConfigError(
            f"distributed_executor_backend {executor} does not go with data_parallel_backend ray, where an engine's "
            "workers are in its bundles; leave it out"
        )


def refuse_ray_options(parallel: ParallelConfig, backend: str) -> None:
    """ConfigError for an option of Ray where another executor runs."""
    if given := [f"--{name.replace('_', '-')}" for name in OPTIONS if getattr(parallel, name) not in (None, False)]:
        raise ConfigError(
            f"{', '.join(given)} has no effect with the {backend} executor; add --distributed-executor-backend ray"
        )


def carried_environment(environment: Mapping[str, str], told: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What of this environment actors get elsewhere: settings of libraries and the hub's token; not what they are
    `told` otherwise by a runtime environment.

    Never what is a rank's, a member's or a client's own: RANK, LOCAL_RANK, CUDA_VISIBLE_DEVICES, MOE_SERVE_*.
    """
    given = (told or {}).get("env_vars", {})
    return {
        name: value
        for name, value in environment.items()
        if (name in NAMES or name.startswith(PREFIXES)) and name not in given
    }


def runtime_environment(parallel: ParallelConfig, *, computes: bool) -> dict[str, Any]:
    """Of an actor, which is a rank if it `computes`: the operator's, with what is ours."""
    told = dict(parallel.ray_runtime_env or {})
    variables = told.get("env_vars") or {}
    found = told | {"env_vars": variables | import_path(variables.get("PYTHONPATH", ""))}
    return found | {"nsight": NSIGHT} if computes and parallel.ray_workers_use_nsight else found


def import_path(given: str = "") -> dict[str, str]:
    """How a Ray worker finds this package where it is a checkout; the same folder must be on every node then."""
    return {} if HOME.name in INSTALLED else {"PYTHONPATH": f"{HOME}:{given or '${PYTHONPATH}'}"}


def _check_nsight(parallel: ParallelConfig) -> None:
    if "nsight" in (parallel.ray_runtime_env or {}):
        raise ConfigError("ray_workers_use_nsight and nsight in ray_runtime_env say the same; leave out one of them")
    if shutil.which("nsys") is None:
        raise ConfigError(
            "ray_workers_use_nsight needs Nsight Systems on every node of the cluster, but nsys is not on the PATH "
            "here; install it, or leave out --ray-workers-use-nsight"
        )
