"""What holds the pods: a StatefulSet or a LeaderWorkerSet, one pod for each rank or node, all of them or no world."""

from __future__ import annotations

from moe_serve.deploy.deployment import Deployment
from moe_serve.deploy.manifest import Manifest
from moe_serve.deploy.pod import pod_template


def stateful_set(deployment: Deployment, *, config_map: str) -> Manifest:
    """All pods at once, since each waits for all others; a new revision only for pods that somebody deletes, since
    ranks of two revisions are no world."""
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": deployment.metadata(deployment.name),
        "spec": {
            "serviceName": deployment.ranks_name,
            "replicas": deployment.num_pods,
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "OnDelete"},
            "selector": {"matchLabels": deployment.selector},
            "template": pod_template(deployment, config_map=config_map),
        },
    }


def leader_worker_set(deployment: Deployment, *, config_map: str) -> Manifest:
    """One group. Its controller makes the headless Service, under the set's own name, and makes all pods anew when one
    of them restarts, which no back-off delays. The leader must not be waited for: it is ready when all are."""
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": deployment.metadata(deployment.ranks_name),
        "spec": {
            "replicas": 1,
            "startupPolicy": "LeaderCreated",
            "rolloutStrategy": {
                "type": "RollingUpdate",
                "rollingUpdateConfiguration": {"maxUnavailable": 1, "maxSurge": 0},
            },
            "networkConfig": {"subdomainPolicy": "Shared"},
            "leaderWorkerTemplate": {
                "size": deployment.num_pods,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "workerTemplate": pod_template(deployment, config_map=config_map),
            },
        },
    }
