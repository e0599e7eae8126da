"""Objects that are not Kubernetes' own, checked against our schemas and, where they are at hand, published ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
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
Place = tuple[str | int, ...]


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


def faults(manifest: Mapping[str, Any], schema: Schema) -> list[str]:
    """What is wrong, each with the path of its place; nothing where the manifest fits."""
    found = jsonschema.Draft202012Validator(schema).iter_errors(dict(manifest))
    return [f"{dotted(error.absolute_path)}: {error.message}" for error in found]


def dotted(path: Iterable[str | int]) -> str:
    return ".".join(str(step) for step in path)


def places(value: Any, schema: Schema, path: Place = ()) -> Iterator[tuple[Place, bool]]:
    """Every place of a value that a schema speaks of, and whether its name is the schema's, not a free key of a map."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from places(item, schema.get("items", {}), (*path, number))
    elif isinstance(value, dict):
        fields = schema.get("properties", {})
        rest = schema.get("additionalProperties")
        for name, inner in value.items():
            part = fields.get(name, rest)
            if isinstance(part, dict):
                yield (*path, name), name in fields
                yield from places(inner, part, (*path, name))


def closed(schema: Schema) -> Schema:
    """As a strict API server takes it: unlisted fields are errors, an int-or-string is either of the two."""
    made: Schema = {}
    for name, value in schema.items():
        if name == "properties":
            made[name] = {field: closed(inner) for field, inner in value.items()}
        elif name in ("items", "additionalProperties") and isinstance(value, dict):
            made[name] = closed(value)
        else:
            made[name] = value
    if schema.get("type") == "object" and not any(name in schema for name in OPEN):
        made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
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
