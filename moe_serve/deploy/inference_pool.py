"""A pool of ranks behind a gateway, whose endpoint picker chooses a rank for each request (Gateway API)."""

from __future__ import annotations

from moe_serve.deploy.deployment import Deployment
from moe_serve.deploy.manifest import Manifest

POOL_GROUP = "inference.networking.k8s.io"
ROUTE_GROUP = "gateway.networking.k8s.io"
PICKER_PORT = 9002


def inference_pool(deployment: Deployment) -> Manifest:
    """Each port of each pod is an endpoint: every rank is one. No pick, no answer: one chosen blindly may be full."""
    picker = deployment.options.endpoint_picker or f"{deployment.name}-epp"
    return {
        "apiVersion": f"{POOL_GROUP}/v1",
        "kind": "InferencePool",
        "metadata": deployment.metadata(deployment.name),
        "spec": {
            "selector": {"matchLabels": deployment.selector},
            "targetPorts": [{"number": port} for port in deployment.http_ports.values()],
            "endpointPickerRef": {
                "group": "",
                "kind": "Service",
                "name": picker,
                "port": {"number": PICKER_PORT},
                "failureMode": "FailClose",
            },
        },
    }


def http_route(deployment: Deployment) -> Manifest:
    """Without time-outs: an answer may take minutes, and its client may leave at any time."""
    return {
        "apiVersion": f"{ROUTE_GROUP}/v1",
        "kind": "HTTPRoute",
        "metadata": deployment.metadata(deployment.service),
        "spec": {
            "parentRefs": [{"group": ROUTE_GROUP, "kind": "Gateway", "name": deployment.options.gateway}],
            "rules": [
                {
                    "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
                    "backendRefs": [
                        {"group": POOL_GROUP, "kind": "InferencePool", "name": deployment.name, "weight": 1}
                    ],
                    "timeouts": {"request": "0s", "backendRequest": "0s"},
                }
            ],
        },
    }
