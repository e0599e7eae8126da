"""How Prometheus finds a world's ranks and what it calls them."""

from __future__ import annotations

import re

from moe_serve.deploy.deployment import Deployment
from moe_serve.deploy.manifest import Manifest

WORLD, RANK = "world", "rank"
"""Labels that every series of a rank gets."""


def pod_monitor(deployment: Deployment) -> Manifest:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": deployment.metadata(deployment.name),
        "spec": {
            "selector": {"matchLabels": deployment.selector},
            "podMetricsEndpoints": [
                {
                    "port": port,
                    "path": "/metrics",
                    "interval": "15s",
                    "relabelings": [
                        {"action": "replace", "targetLabel": WORLD, "replacement": deployment.name},
                        *_rank_labels(deployment, place),
                    ],
                }
                for place, port in enumerate(deployment.http_ports)
            ],
        },
    }


def _rank_labels(deployment: Deployment, place: int) -> list[Manifest]:
    """Of the rank at this place of its pod. A relabeling cannot multiply, so each node's rank is written out."""
    label = "__meta_kubernetes_pod_label_" + re.sub(r"[^A-Za-z0-9_]", "_", deployment.index_label)
    named: Manifest = {"action": "replace", "sourceLabels": [label], "targetLabel": RANK}
    if not deployment.is_node_shape:
        return [named]
    return [
        {**named, "regex": str(pod), "replacement": str(pod * deployment.ranks_per_pod + place)}
        for pod in range(deployment.num_pods)
    ]
