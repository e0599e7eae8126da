"""What docs/kubernetes/README.md tells its reader to type fits the manifests that it tells him to make."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.manifests import Objects, objects_of
from tests.support.pages import ROOT, blocks, commands

PAGE = ROOT / "docs" / "kubernetes" / "README.md"
DEPLOY, NODES, RESTART, UPDATE = blocks(PAGE)


def world_of(block: str) -> Objects:
    ((_, command, *options),) = commands(block)
    assert command == "render"
    return objects_of(shlex.join(options))


def kubectl(block: str, verb: str) -> list[list[str]]:
    return [words for words in commands(block, "kubectl") if words[0] == verb]


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def labels_of(words: list[str]) -> dict[str, str]:
    name, _, value = after(words, "-l").partition("=")
    return {name: value}


def chosen(objects: Objects, words: list[str]) -> Iterator[Any]:
    """What `kubectl delete KINDS -l LABEL` would delete of a world."""
    (kinds,) = [set(word.split(",")) for word in words if "," in word]
    for each in objects.documents:
        labels = each["metadata"].get("labels", {})
        if each["kind"].lower() in kinds and labels_of(words).items() <= labels.items():
            yield each


@pytest.mark.parametrize("block", [DEPLOY, NODES, UPDATE], ids=["deploy", "nodes", "update"])
def test_the_secret_that_the_page_makes_is_the_one_that_the_pods_read(block: str) -> None:
    objects, ((*_, kind, name), *_) = world_of(block), [words[:4] for words in kubectl(block, "create")]
    assert kind == "generic"
    (reference,) = [
        variable["valueFrom"]["secretKeyRef"]
        for variable in objects.container["env"]
        if variable["name"] == "MOE_SERVE_WORLD_TOKEN"
    ]
    assert reference["name"] == name
    assert f"--from-literal={reference['key']}=" in block


@pytest.mark.parametrize("block", [DEPLOY, NODES, UPDATE], ids=["deploy", "nodes", "update"])
def test_the_page_waits_for_the_pods_of_the_world_that_it_applied(block: str) -> None:
    objects, (words,) = world_of(block), kubectl(block, "wait")
    assert labels_of(words).items() <= objects.template["metadata"]["labels"].items()
    assert after(words, "--namespace") == objects.template["metadata"].get("namespace", "serving")
    (applied,) = kubectl(block, "apply")
    assert block.count(after(applied, "-f")) == 2, "what is written is what is applied"


def test_starting_a_world_anew_deletes_its_pods_and_no_others() -> None:
    (words,) = kubectl(RESTART, "delete")
    assert words[1] == "pod"
    assert labels_of(words).items() <= world_of(DEPLOY).template["metadata"]["labels"].items()
    assert not labels_of(words).items() <= world_of(UPDATE).template["metadata"]["labels"].items()


def test_an_update_deletes_the_old_world_whole_but_for_the_service_that_both_share() -> None:
    (words,) = kubectl(UPDATE, "delete")
    old, new = world_of(DEPLOY), world_of(UPDATE)
    deleted = [(each["kind"], each["metadata"]["name"]) for each in chosen(old, words)]
    left = {(each["kind"], each["metadata"]["name"]) for each in old.documents} - set(deleted)
    assert left == {("Service", "qwen")}
    assert new.one("Service", "qwen") == old.one("Service", "qwen")
    assert not list(chosen(new, words))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("block", [DEPLOY, NODES, UPDATE], ids=["deploy", "nodes", "update"])
def test_kubectl_understands_how_the_page_makes_the_secret(block: str) -> None:
    (line,) = re.findall(r"^kubectl create secret .*$", block, re.MULTILINE)
    told = subprocess.run(
        ["sh", "-c", f"{line} --dry-run=client -o name"], capture_output=True, text=True, check=False, timeout=60
    )
    assert told.stdout.startswith("secret/"), told.stderr
