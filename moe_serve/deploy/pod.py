"""The pod of a rank or a node: what runs in it, who may do what, when it counts as started, alive and ready."""

from __future__ import annotations

import math

from moe_serve.deploy.command_line import CONFIG_FOLDER, arguments
from moe_serve.deploy.deployment import MODELS, Deployment
from moe_serve.deploy.manifest import Manifest
from moe_serve.deploy.secrets import api_keys, keys_name, token_name

USER = 10001
SETTLE_SECONDS = 5
"""Between a pod's leaving the Service and its SIGTERM: load balancers hear of it late."""
LAST_WORDS_SECONDS = 15
"""After the last answer, for the world to end in order."""
PROBE_SECONDS = 10
HOST = "kubernetes.io/hostname"


def pod_template(deployment: Deployment, *, config_map: str) -> Manifest:
    grace = SETTLE_SECONDS + math.ceil(deployment.config.server.shutdown_timeout) + LAST_WORDS_SECONDS
    return {
        "metadata": {"labels": deployment.labels},
        "spec": {
            # Variables of Services would look like options: a Service named moe-serve makes MOE_SERVE_PORT.
            "enableServiceLinks": False,
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": grace,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **_places(deployment),
            "containers": [_container(deployment)],
            "volumes": _volumes(deployment, config_map),
        },
    }


def _places(deployment: Deployment) -> Manifest:
    """Ranks evenly over nodes, so that a node's loss costs no more of them than it must, but never rather than not at
    all. A node's pod is alone on it: the ranks of two would not reach each other's memory."""
    ours = {"labelSelector": {"matchLabels": deployment.selector}}
    if deployment.is_node_shape:
        apart = [{"topologyKey": HOST, **ours}]
        return {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": apart}}}
    evenly = {"maxSkew": 1, "topologyKey": HOST, "whenUnsatisfiable": "ScheduleAnyway", **ours}
    return {"topologySpreadConstraints": [evenly]}


def _container(deployment: Deployment) -> Manifest:
    return {
        "name": "moe-serve",
        "image": deployment.options.image,
        "command": ["moe-serve"],
        "args": arguments(deployment),
        "env": _environment(deployment),
        "ports": [
            {"name": name, "containerPort": port}
            for name, port in {**deployment.http_ports, **deployment.other_ports}.items()
        ],
        **_probes(deployment),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(SETTLE_SECONDS)]}}},
        "resources": _resources(deployment),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"], **({"add": ["IPC_LOCK"]} if deployment.options.rdma_resource else {})},
        },
        "volumeMounts": _mounts(deployment),
    }


def _environment(deployment: Deployment) -> list[Manifest]:
    index = {"fieldRef": {"fieldPath": f"metadata.labels['{deployment.index_label}']"}}
    variables: list[Manifest] = []
    if not deployment.is_leader_worker_set:  # its controller sets LWS_WORKER_INDEX and LWS_LEADER_ADDRESS
        variables.append({"name": "POD_INDEX", "valueFrom": index})
    variables.append(_secret("MOE_SERVE_WORLD_TOKEN", token_name(deployment), "token"))
    variables += [
        _secret(f"MOE_SERVE_{key.upper()}", keys_name(deployment), key.replace("_", "-"))
        for key in api_keys(deployment)
    ]
    variables.append({"name": "HOME", "value": "/tmp"})
    if deployment.is_from_hub:
        variables.append({"name": "HF_HOME", "value": MODELS})
        variables.append(_secret("HF_TOKEN", f"{deployment.name}-hub", "token", optional=True))
    return variables


def _secret(variable: str, name: str, key: str, *, optional: bool = False) -> Manifest:
    reference: Manifest = {"name": name, "key": key, **({"optional": True} if optional else {})}
    return {"name": variable, "valueFrom": {"secretKeyRef": reference}}


def _probes(deployment: Deployment) -> Manifest:
    """Started and ready is the world's affair, alive the process's own: a death elsewhere must restart nobody twice."""
    limit = deployment.config.parallel.start_timeout_seconds
    start = math.ceil((limit + 60) / PROBE_SECONDS)  # the ranks give up first, and say who is missing
    patience = start if deployment.config.parallel.restart_world else 3
    return {
        "startupProbe": _probe(deployment, "/readyz", every=PROBE_SECONDS, failures=start),
        "livenessProbe": _probe(deployment, "/livez", every=PROBE_SECONDS, failures=patience),
        "readinessProbe": _probe(deployment, "/readyz", every=2, failures=1),
    }


def _probe(deployment: Deployment, path: str, *, every: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": deployment.probed_port},
        "periodSeconds": every,
        "timeoutSeconds": min(5, every),
        "failureThreshold": failures,
    }


def _resources(deployment: Deployment) -> Manifest:
    options, parallel = deployment.options, deployment.config.parallel
    devices = {}
    if deployment.config.model.device != "cpu":
        devices["nvidia.com/gpu"] = str(parallel.world_size * deployment.ranks_per_pod)
    if options.rdma_resource is not None:
        devices[options.rdma_resource] = "1"
    return {
        "requests": {"cpu": options.cpu, "memory": options.memory, **devices},
        "limits": {"memory": options.memory, **devices},
    }


def _mounts(deployment: Deployment) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if _has_models(deployment):
        read_only = {} if deployment.is_from_hub else {"readOnly": True}
        mounts.append({"name": "models", "mountPath": MODELS, **read_only})
    return mounts


def _volumes(deployment: Deployment, config_map: str) -> list[Manifest]:
    volumes: list[Manifest] = [
        {"name": "config", "configMap": {"name": config_map}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": deployment.options.shm_size}},
        {"name": "tmp", "emptyDir": {}},
    ]
    if _has_models(deployment):
        claim = deployment.options.model_claim
        kept: Manifest = {"emptyDir": {}} if claim is None else {"persistentVolumeClaim": {"claimName": claim}}
        volumes.append({"name": "models", **kept})
    return volumes


def _has_models(deployment: Deployment) -> bool:
    return deployment.is_from_hub or deployment.options.model_claim is not None
