"""How a world is found, reached and left alone: Services, the policy of its network, its disruption budget."""

from __future__ import annotations

from moe_serve.deploy.deployment import Deployment
from moe_serve.deploy.manifest import Manifest
from moe_serve.deploy.pod import HTTP, RENDEZVOUS


def ranks_service(deployment: Deployment) -> Manifest:
    """A name for each rank, also before it is ready: ranks must meet to become ready."""
    rpc_port = deployment.config.parallel.data_parallel_rpc_port
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": deployment.metadata(deployment.ranks_name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": deployment.selector,
            "ports": [
                {"name": HTTP, "port": deployment.port, "targetPort": HTTP},
                {"name": RENDEZVOUS, "port": rpc_port, "targetPort": RENDEZVOUS},
            ],
        },
    }


def client_service(deployment: Deployment) -> Manifest:
    """The ready ranks of all worlds that share it."""
    labels = deployment.labels
    selector = {name: labels[name] for name in ("app.kubernetes.io/name", "app.kubernetes.io/part-of")}
    metadata = deployment.metadata(deployment.service)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**metadata, "labels": selector},
        "spec": {
            "type": "ClusterIP",
            "sessionAffinity": "None",
            "selector": selector,
            "ports": [{"name": HTTP, "port": deployment.port, "targetPort": HTTP}],
        },
    }


def network_policy(deployment: Deployment) -> Manifest:
    """Ranks reach each other on every port: all but two are negotiated. Everybody else reaches HTTP."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": deployment.metadata(deployment.name),
        "spec": {
            "podSelector": {"matchLabels": deployment.selector},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": deployment.selector}}]},
                {"ports": [{"protocol": "TCP", "port": HTTP}]},
            ],
        },
    }


def disruption_budget(deployment: Deployment) -> Manifest:
    """Whoever loses one rank loses the world, so nobody may be evicted for convenience."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": deployment.metadata(deployment.name),
        "spec": {"maxUnavailable": 0, "selector": {"matchLabels": deployment.selector}},
    }
