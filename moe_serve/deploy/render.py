"""All objects of a deployment, in the order in which they are applied, and the text that `kubectl apply -f -` reads."""

from __future__ import annotations

from moe_serve.deploy.alerts import prometheus_rule
from moe_serve.deploy.command_line import OPTIONS_FILE, PLACEMENT_FILE, options_file
from moe_serve.deploy.deployment import Deployment
from moe_serve.deploy.inference_pool import http_route, inference_pool
from moe_serve.deploy.manifest import Manifest, digest, to_documents, to_yaml
from moe_serve.deploy.network import client_service, disruption_budget, network_policy, ranks_service
from moe_serve.deploy.scraping import pod_monitor
from moe_serve.deploy.secrets import how_to_make_the_token, secrets
from moe_serve.deploy.workload import leader_worker_set, stateful_set


def manifests(deployment: Deployment) -> list[Manifest]:
    config_map = _config_map(deployment)
    name = f"{deployment.name}-{digest(config_map['data'])}"
    workload = leader_worker_set if deployment.is_leader_worker_set else stateful_set
    return [
        {**config_map, "metadata": deployment.metadata(name)},
        *secrets(deployment),
        *([] if deployment.is_leader_worker_set else [ranks_service(deployment)]),
        client_service(deployment),
        network_policy(deployment),
        disruption_budget(deployment),
        workload(deployment, config_map=name),
        *([pod_monitor(deployment), prometheus_rule(deployment)] if deployment.options.monitoring else []),
        *(_pool(deployment) if deployment.options.target == "inferencepool" else []),
    ]


def render(deployment: Deployment) -> str:
    """YAML, with what is left to be done at the top."""
    pods = f" in {deployment.num_pods} pods" if deployment.is_node_shape else ""
    lines = [f"One world of {deployment.num_ranks} ranks{pods}, written by `moe-serve k8s render`."]
    if deployment.token is None:
        lines += ["The secret by which its ranks know each other is made once, before the first `kubectl apply`:"]
        lines += [f"  {how_to_make_the_token(deployment)}"]
    if deployment.is_from_hub and deployment.options.model_claim is None:
        lines += ["Every pod fetches the model anew: --model-claim names a claim that keeps it."]
    return "".join(f"# {line}\n" for line in lines) + to_documents(manifests(deployment))


def _config_map(deployment: Deployment) -> Manifest:
    """Its name changes with what it holds, so that a container that restarts finds what its world agreed on."""
    placement = {} if deployment.placement is None else {PLACEMENT_FILE: deployment.placement}
    data = {OPTIONS_FILE: to_yaml(options_file(deployment)), **placement}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {}, "immutable": True, "data": data}


def _pool(deployment: Deployment) -> list[Manifest]:
    return [inference_pool(deployment), http_route(deployment)]
