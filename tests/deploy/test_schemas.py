"""Every object is one that Kubernetes, or the project that defines its kind, would take."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from scripts.kubernetes_examples import KEPT
from tests.support.crds import (
    PUBLISHED,
    Place,
    Schema,
    closed,
    dotted,
    faults,
    key_of,
    leaves,
    own_schemas,
    places,
    published_schemas,
)
from tests.support.manifests import Objects

VERSIONS = ("1.28", "1.31", "1.34", "1.37")
"""1.28 is the first that labels a StatefulSet's pods with their index."""
OURS = own_schemas()
WRONG = 1.5
"""No field of ours is a fraction."""
needs_published = pytest.mark.skipif(
    not PUBLISHED, reason="KUBERNETES_CRDS names no folder with the published definitions"
)


def core(objects: Objects) -> Iterator[dict[str, Any]]:
    """What Kubernetes itself knows; the pods of other kinds as templates."""
    for document in objects.documents:
        if key_of(document) not in OURS:
            yield dict(document)
    yield {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pods"}, "template": objects.template}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_kubernetes_knows_is_valid_in_each_version(objects: Objects, version: str) -> None:
    for document in core(objects):
        _validate(json.dumps(document), version)


@cache
def _validate(document: str, version: str) -> None:
    """Cases share most of their objects."""
    assert kubernetes_validate.validate(json.loads(document), version, strict=True) == version


def test_what_others_define_fits_their_schemas(objects: Objects) -> None:
    kinds = {document["kind"] for document in objects.documents if key_of(document) in OURS}
    assert kinds or not objects.deployment.options.monitoring
    for document in objects.documents:
        if key_of(document) in OURS:
            assert not faults(document, OURS[key_of(document)])


@pytest.mark.parametrize("name", ["everything", "group"])
def test_a_field_that_does_not_exist_is_noticed_in_every_kind(name: str) -> None:
    """The two tests above can fail."""
    for document in yaml.safe_load_all((KEPT / f"{name}.yaml").read_text()):
        broken = copy.deepcopy(document)
        if "spec" not in broken:
            continue
        broken["spec"]["noSuchField"] = 1
        if key_of(broken) in OURS:
            assert any("noSuchField" in fault for fault in faults(broken, OURS[key_of(broken)]))
            continue
        with pytest.raises(kubernetes_validate.ValidationError, match="noSuchField"):
            kubernetes_validate.validate(broken, VERSIONS[0], strict=True)


@pytest.mark.parametrize("published", [False, pytest.param(True, marks=needs_published)], ids=["ours", "published"])
@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.rpartition("/")[2])
def test_each_field_is_refused_by_name_when_it_is_misspelt_or_of_a_wrong_type(kind: str, published: bool) -> None:
    schema = (published_schemas() if published else OURS)[kind]
    document = _kept(kind)
    assert not faults(document, schema)
    tried = [(place, named) for place, named in places(document, schema) if place[0] == "spec" and len(place) > 1]
    assert any(named for _, named in tried)
    for place, named in tried:
        wrong = faults(_changed(document, place, value=WRONG), schema)
        assert any(fault.startswith(f"{dotted(place)}: ") for fault in wrong), place
        if named:
            misspelt = faults(_changed(document, place, name=f"{place[-1]}X"), schema)
            assert any(f"'{place[-1]}X' was unexpected" in fault for fault in misspelt), place


def _kept(kind: str) -> dict[str, Any]:
    for name in ("everything", "group"):
        for document in yaml.safe_load_all((KEPT / f"{name}.yaml").read_text()):
            if key_of(document) == kind:
                return dict(document)
    raise AssertionError(f"no kept manifest has a {kind}")


def _changed(document: dict[str, Any], place: Place, *, value: Any = None, name: str | None = None) -> dict[str, Any]:
    """A copy with another value at a place, or with the field there renamed."""
    changed = copy.deepcopy(document)
    parent: Any = changed
    for step in place[:-1]:
        parent = parent[step]
    if name is None:
        parent[place[-1]] = value
    else:
        parent[name] = parent.pop(place[-1])
    return changed


def test_what_an_api_server_would_prune_is_closed_and_what_it_keeps_is_open() -> None:
    schema: Schema = closed(
        {
            "type": "object",
            "properties": {
                "bare": {"type": "object"},
                "kept": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "port": {"x-kubernetes-int-or-string": True},
            },
        }
    )
    assert not faults({"bare": {}, "kept": {"any": 1}, "labels": {"any": "text"}, "port": "http"}, schema)
    assert not faults({"port": 80}, schema)
    for broken, place in (
        ({"other": 1}, ""),
        ({"bare": {"any": 1}}, "bare"),
        ({"labels": {"any": 1}}, "labels.any"),
        ({"port": 1.5}, "port"),
    ):
        (fault,) = faults(broken, schema)
        assert fault.startswith(f"{place}: ")


@needs_published
def test_what_others_define_fits_the_definitions_that_they_publish(objects: Objects) -> None:
    published = published_schemas()
    for document in objects.documents:
        if key_of(document) in OURS:
            assert not faults(document, published[key_of(document)])


@needs_published
@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.rpartition("/")[2])
def test_our_schemas_list_nothing_that_the_published_definitions_do_not(kind: str) -> None:
    published = dict(leaves(published_schemas()[kind]["properties"]["spec"]))
    for path, schema in leaves(OURS[kind]["properties"]["spec"]):
        theirs = published.get(path)
        assert theirs is not None, path
        if path.endswith("Template.workerTemplate.metadata") or "enum" not in schema:
            assert theirs.get("x-kubernetes-int-or-string") or schema["type"] == theirs["type"], path
        else:
            assert set(schema["enum"]) <= set(theirs["enum"]), path


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl here")
@pytest.mark.parametrize("name", ["everything", "group"])
def test_kustomize_reads_the_manifests_and_changes_them(name: str, tmp_path: Path) -> None:
    path = KEPT / f"{name}.yaml"
    shutil.copy(path, tmp_path / "world.yaml")
    (tmp_path / "kustomization.yaml").write_text("resources: [world.yaml]\nnamePrefix: my-\n")
    done = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(list(yaml.safe_load_all(path.read_text())))
    assert all(document["metadata"]["name"].startswith("my-") for document in built)
