"""How a world is found, reached and left alone: Services, the policy of its network, its disruption budget."""

from __future__ import annotations

from collections.abc import Mapping

from moe_serve.deploy.deployment import Deployment
from moe_serve.deploy.manifest import Manifest


def ranks_service(deployment: Deployment) -> Manifest:
    """A name for each pod, also before it is ready: ranks must meet to become ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": deployment.metadata(deployment.ranks_name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": deployment.selector,
            "ports": _service_ports({**deployment.http_ports, **deployment.other_ports}),
        },
    }


def client_service(deployment: Deployment) -> Manifest:
    """The ready pods of all worlds that share it. Of several ports a client chooses one: a Service does not spread
    over them."""
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
            "ports": _service_ports(deployment.http_ports),
        },
    }


def network_policy(deployment: Deployment) -> Manifest:
    """Ranks reach each other on every port: nearly all are negotiated. Everybody else reaches HTTP, and what is probed:
    not every network lets the node's own probes pass."""
    open_ports = dict.fromkeys([*deployment.http_ports, deployment.probed_port])
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": deployment.metadata(deployment.name),
        "spec": {
            "podSelector": {"matchLabels": deployment.selector},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": deployment.selector}}]},
                {"ports": [{"protocol": "TCP", "port": name} for name in open_ports]},
            ],
        },
    }


def _service_ports(ports: Mapping[str, int]) -> list[Manifest]:
    return [{"name": name, "port": port, "targetPort": name} for name, port in ports.items()]


def disruption_budget(deployment: Deployment) -> Manifest:
    """Whoever loses one rank loses the world, so nobody may be evicted for convenience."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": deployment.metadata(deployment.name),
        "spec": {"maxUnavailable": 0, "selector": {"matchLabels": deployment.selector}},
    }
