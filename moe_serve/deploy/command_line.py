"""How a pod's container is started: arguments for what makes it a part of this world, a file for everything else."""

from __future__ import annotations

from pydantic import BaseModel, SecretStr

from moe_serve.deploy.deployment import Deployment, given_options, host_of

CONFIG_FOLDER = "/etc/moe-serve"
OPTIONS_FILE = "serve.yaml"
PLACEMENT_FILE = "placement.json"
IN_ARGUMENTS = {
    "model",
    "host",
    "port",
    "data_parallel_size",
    "data_parallel_size_local",
    "data_parallel_rpc_port",
    "data_parallel_multi_port_external_lb",
    "data_parallel_supervisor_port",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "enable_expert_parallel",
}
ELSEWHERE = {"world_token_file", "expert_placement_file", "api_key", "admin_api_key"}
"""Secrets, and what lies at a path of its own in a pod."""


def arguments(deployment: Deployment) -> list[str]:
    """What follows `moe-serve`; $(NAME) is filled in from the pod's environment."""
    config = deployment.config
    parallel = config.parallel
    index = "$(LWS_WORKER_INDEX)" if deployment.is_leader_worker_set else "$(POD_INDEX)"
    return [
        "serve",
        *([_literal(config.model.model)] if config.model.model is not None else []),
        f"--config={CONFIG_FOLDER}/{OPTIONS_FILE}",
        f"--host={host_of(config)}",
        f"--port={config.server.port}",
        f"--data-parallel-size={parallel.data_parallel_size}",
        *(_node(deployment, index) if deployment.is_node_shape else [f"--data-parallel-rank={index}"]),
        f"--data-parallel-address={deployment.rank_0}",
        f"--data-parallel-rpc-port={parallel.data_parallel_rpc_port}",
        f"--tensor-parallel-size={parallel.tensor_parallel_size}",
        *(["--enable-expert-parallel"] if parallel.enable_expert_parallel else []),
    ]


def _node(deployment: Deployment, index: str) -> list[str]:
    return [
        f"--data-parallel-size-local={deployment.ranks_per_pod}",
        f"--node-rank={index}",
        "--data-parallel-multi-port-external-lb",
        f"--data-parallel-supervisor-port={deployment.config.parallel.data_parallel_supervisor_port}",
    ]


def options_file(deployment: Deployment) -> dict[str, object]:
    """What --config names: every other option that was given, under its name."""
    given = given_options(deployment.config)
    values = {name: _plain(value) for name, value in given.items() if name not in IN_ARGUMENTS | ELSEWHERE}
    if deployment.placement is not None:
        values["expert_placement_file"] = f"{CONFIG_FOLDER}/{PLACEMENT_FILE}"
    return dict(sorted(values.items()))


def _plain(value: object) -> object:
    """As YAML has it."""
    assert not isinstance(value, SecretStr)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    return list(value) if isinstance(value, tuple) else value


def _literal(text: str) -> str:
    """Kubernetes fills in $(NAME) wherever it finds it, and makes $$ one $."""
    return text.replace("$", "$$")
