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

import jsonschema
import kubernetes_validate
import pytest
import yaml

from scripts.kubernetes_examples import KEPT
from tests.support.crds import PUBLISHED, check, key_of, leaves, own_schemas, published_schemas
from tests.support.manifests import Objects

VERSIONS = ("1.28", "1.31", "1.34", "1.37")
"""1.28 is the first that labels a StatefulSet's pods with their index."""
OURS = own_schemas()


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
            check(document, OURS[key_of(document)])


@pytest.mark.parametrize("name", ["everything", "group"])
def test_a_field_that_does_not_exist_is_noticed_in_every_kind(name: str) -> None:
    """The two tests above can fail."""
    for document in yaml.safe_load_all((KEPT / f"{name}.yaml").read_text()):
        broken = copy.deepcopy(document)
        if "spec" not in broken:
            continue
        broken["spec"]["noSuchField"] = 1
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            _check_any(broken)


def _check_any(document: dict[str, Any]) -> None:
    if key_of(document) in OURS:
        check(document, OURS[key_of(document)])
    else:
        kubernetes_validate.validate(document, VERSIONS[0], strict=True)


@pytest.mark.skipif(not PUBLISHED, reason="KUBERNETES_CRDS names no folder with the published definitions")
def test_what_others_define_fits_the_definitions_that_they_publish(objects: Objects) -> None:
    published = published_schemas()
    for document in objects.documents:
        if key_of(document) in OURS:
            check(document, published[key_of(document)])


@pytest.mark.skipif(not PUBLISHED, reason="KUBERNETES_CRDS names no folder with the published definitions")
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
