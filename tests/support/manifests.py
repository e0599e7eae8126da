"""Rendered manifests for tests: by kind, and what a pod's container would be started with."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_serve.base.section import ENVIRONMENT_PREFIX
from moe_serve.cli.k8s import parse_render
from moe_serve.deploy.deployment import Deployment
from moe_serve.deploy.render import manifests

ROOT = Path(__file__).parents[2]
WORKLOADS = ("StatefulSet", "LeaderWorkerSet")


@dataclass(frozen=True, slots=True)
class Objects:
    deployment: Deployment
    documents: Sequence[Mapping[str, Any]]

    def one(self, kind: str, name: str | None = None) -> Any:
        found = [each for each in self.documents if each["kind"] == kind and name in (None, each["metadata"]["name"])]
        assert len(found) == 1, f"{len(found)} objects {kind} {name or ''}"
        return found[0]

    def has(self, kind: str) -> bool:
        return any(each["kind"] == kind for each in self.documents)

    @property
    def template(self) -> Any:
        """Of the pods."""
        workload = next(each for each in self.documents if each["kind"] in WORKLOADS)
        spec = workload["spec"]
        return spec["template"] if "template" in spec else spec["leaderWorkerTemplate"]["workerTemplate"]

    @property
    def container(self) -> Any:
        (container,) = self.template["spec"]["containers"]
        return container


def rendered(command: str) -> Deployment:
    """Of the arguments of `moe-serve k8s render`; paths are the project's own."""
    folder = Path.cwd()
    os.chdir(ROOT)
    try:
        return parse_render(shlex.split(command))
    finally:
        os.chdir(folder)


def objects_of(command: str) -> Objects:
    deployment = rendered(command)
    return Objects(deployment, manifests(deployment))


def as_kubelet(objects: Objects, pod: int, token: str) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of one pod's container, with secrets and fields filled in as a kubelet does."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    for variable in objects.container["env"]:
        environment[variable["name"]] = _value(objects, variable, pod, token)
    if objects.has("LeaderWorkerSet"):
        environment |= {"LWS_WORKER_INDEX": str(pod), "LWS_LEADER_ADDRESS": "leader.example"}
    container = objects.container
    return [expanded(text, environment) for text in (*container["command"], *container["args"])], environment


def expanded(text: str, environment: Mapping[str, str]) -> str:
    """$(NAME) is replaced where there is such a variable; $$ stands for $."""
    pattern = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")
    return pattern.sub(lambda found: environment.get(found[1], found[0]) if found[1] else "$", text)


def _value(objects: Objects, variable: Mapping[str, Any], pod: int, token: str) -> str:
    if "value" in variable:
        return str(variable["value"])
    source = variable["valueFrom"]
    if "fieldRef" in source:
        assert source["fieldRef"]["fieldPath"] == "metadata.labels['apps.kubernetes.io/pod-index']"
        return str(pod)
    reference = source["secretKeyRef"]
    for document in objects.documents:
        if document["kind"] == "Secret" and document["metadata"]["name"] == reference["name"]:
            return str(document["stringData"][reference["key"]])
    return token
