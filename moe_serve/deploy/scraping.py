"""How Prometheus finds a world's ranks and what it calls them."""

from __future__ import annotations

import re

from moe_serve.deploy.deployment import Deployment
from moe_serve.deploy.manifest import Manifest
from moe_serve.deploy.pod import HTTP

WORLD, RANK = "world", "rank"
"""Labels that every series of a rank gets."""


def pod_monitor(deployment: Deployment) -> Manifest:
    label = "__meta_kubernetes_pod_label_" + re.sub(r"[^A-Za-z0-9_]", "_", deployment.rank_label)
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": deployment.metadata(deployment.name),
        "spec": {
            "selector": {"matchLabels": deployment.selector},
            "podMetricsEndpoints": [
                {
                    "port": HTTP,
                    "path": "/metrics",
                    "interval": "15s",
                    "relabelings": [
                        {"action": "replace", "targetLabel": WORLD, "replacement": deployment.name},
                        {"action": "replace", "sourceLabels": [label], "targetLabel": RANK},
                    ],
                }
            ],
        },
    }
