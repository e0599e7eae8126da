"""Objects that are not Kubernetes' own, checked against our schemas and, where they are at hand, published ones."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

FOLDER = Path(__file__).parents[1] / "data" / "crds"
PUBLISHED = os.environ.get("KUBERNETES_CRDS", "")
"""Folder with CustomResourceDefinitions, from the projects that publish them."""
OPEN = ("x-kubernetes-preserve-unknown-fields", "additionalProperties", "x-kubernetes-embedded-resource")
Schema = dict[str, Any]


@cache
def own_schemas() -> dict[str, Schema]:
    """apiVersion/kind -> schema of a whole object."""
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        about = yaml.safe_load(path.read_text())
        found[f"{about['group']}/{about['version']}/{about['kind']}"] = _whole(about["spec"])
    return found


@cache
def published_schemas() -> dict[str, Schema]:
    """The same, of the definitions in the folder that KUBERNETES_CRDS names; closed, as a strict API server is."""
    found = {}
    for definition in _definitions():
        spec = definition["spec"]
        for version in spec["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            found[f"{spec['group']}/{version['name']}/{spec['names']['kind']}"] = _whole(
                closed(schema["properties"]["spec"])
            )
    return found


def key_of(manifest: Mapping[str, Any]) -> str:
    return f"{manifest['apiVersion']}/{manifest['kind']}"


def check(manifest: Mapping[str, Any], schema: Schema) -> None:
    jsonschema.Draft202012Validator(schema).validate(dict(manifest))


def closed(schema: Schema) -> Schema:
    """Fields that are not listed are errors; a number or a text is either."""
    made: Schema = {}
    for name, value in schema.items():
        if name == "properties":
            made[name] = {field: closed(inner) for field, inner in value.items()}
        elif name in ("items", "additionalProperties") and isinstance(value, dict):
            made[name] = closed(value)
        else:
            made[name] = value
    if "properties" in schema and not any(name in schema for name in OPEN):
        made["additionalProperties"] = False
    return made


def leaves(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every place of a schema, with a path that tells lists apart."""
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from leaves(inner, f"{path}.{name}")
    if isinstance(schema.get("items"), dict):
        yield from leaves(schema["items"], f"{path}[]")


def _whole(spec: Schema) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object", "required": ["name"]},
            "spec": spec,
        },
    }


def _definitions() -> Iterator[Mapping[str, Any]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for path in sorted(Path(PUBLISHED).rglob("*.yaml")) if PUBLISHED else []:
        for document in yaml.load_all(path.read_text(), Loader=loader):
            if isinstance(document, dict) and document.get("kind") == "CustomResourceDefinition":
                yield document
