"""`moe-serve k8s render|dashboard`: what Kubernetes and Grafana are given, on standard output.

`render` takes every option of `moe-serve serve`, so that a world in a cluster is said as one on this machine is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, create_model
from pydantic_core import PydanticUndefined

from moe_serve.base.config import SECTIONS, Config, explain
from moe_serve.base.errors import ConfigError
from moe_serve.cli.flags import Options, help_text, wants_help
from moe_serve.cli.serve import read_options, serve_fields
from moe_serve.deploy.dashboard import dashboard
from moe_serve.deploy.deployment import Deployment, make_deployment, pod_config, refuse_nodes
from moe_serve.deploy.options import ClusterOptions
from moe_serve.deploy.render import render
from moe_serve.launch.resolve import resolve

USAGE = """usage: moe-serve k8s COMMAND

commands:
  render [MODEL] --name N --image I [OPTIONS]    write the manifests of a world, a pod for each rank or node
  dashboard                                      write a dashboard for Grafana, as JSON

`moe-serve k8s render --help` lists its options."""
ABOUT_RENDER = (
    "Write the manifests of one world to standard output, for `kubectl apply -f -`: one pod for each data-parallel "
    "rank, or with --shape node for each node, and an HTTP server for each rank. Every option of `moe-serve serve` may "
    "be given, also in the environment and with --config; what follows from a pod's place in its world is left out."
)


def run_k8s(arguments: Sequence[str]) -> int:
    """The exit code; ConfigError for a command that does not exist and for a world that cannot be."""
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if command == "render":
        return _run_render(rest)
    if command == "dashboard":
        if rest:
            raise ConfigError(f"k8s dashboard takes no arguments (given: {' '.join(rest)})")
        print(json.dumps(dashboard(), indent=2))
        return 0
    raise ConfigError(f"unknown command k8s {command}; known are: render, dashboard")


def _run_render(arguments: Sequence[str]) -> int:
    if wants_help(arguments):
        groups = {"cluster": ClusterOptions.model_fields}
        groups |= {title: section.model_fields for title, section in SECTIONS.items()}
        print(help_text(render_options(), "k8s render", ABOUT_RENDER, groups))
        return 0
    print(render(parse_render(arguments)), end="")
    return 0


@cache
def render_options() -> type[Options]:
    """Those of `moe-serve serve` and those of a cluster."""
    return create_model("RenderOptions", __base__=Options, **serve_fields(), **_cluster_fields())


def parse_render(arguments: Sequence[str]) -> Deployment:
    """Command line (after `k8s render`), environment and YAML file to a deployment. Raises ConfigError."""
    values = read_options(render_options(), arguments, "k8s render")
    refuse_nodes(values)
    theirs = {name: values.pop(name) for name in ClusterOptions.model_fields if name in values}
    if theirs.get("shape") == "node":  # a pod with a supervisor in it
        values["data_parallel_multi_port_external_lb"] = True
    config = Config.from_flat(values)
    parallel = config.parallel
    deployment = make_deployment(
        config,
        _cluster_options(theirs),
        token=_text_of(parallel.world_token_file, "--world-token-file"),
        placement=_text_of(parallel.expert_placement_file, "--expert-placement-file"),
    )
    _check_model(deployment)
    return deployment


def _cluster_fields() -> dict[str, Any]:
    """What is required is asked for once everything was read: only then can one sentence say what is missing."""
    fields: dict[str, Any] = {}
    for name, info in ClusterOptions.model_fields.items():
        default = None if info.default is PydanticUndefined else info.default
        annotation: Any = info.annotation if default is not None else info.annotation | None  # type: ignore[operator]
        fields[name] = (annotation, Field(default, description=info.description))
    return fields


def _cluster_options(values: Mapping[str, object]) -> ClusterOptions:
    missing = [f"--{name}" for name, info in ClusterOptions.model_fields.items() if info.is_required()]
    missing = [flag for flag in missing if flag.removeprefix("--") not in values]
    if missing:
        raise ConfigError(
            f"k8s render needs {' and '.join(missing)}: --name is what the world is called in the cluster, --image the "
            "container image that has this package"
        )
    try:
        return ClusterOptions.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error


def _text_of(path: str | None, option: str) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path} cannot be read: {error}") from error


def _check_model(deployment: Deployment) -> None:
    """A folder that is here too, or the default model, tells beforehand what ranks would refuse in their pods."""
    model = deployment.config.model.model
    if model is None or Path(model).is_dir():
        resolve(pod_config(deployment, 0))
