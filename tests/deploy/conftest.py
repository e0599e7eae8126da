"""Every manifest that is kept, as objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_serve.deploy.render import manifests
from scripts.kubernetes_examples import CASES
from tests.support.manifests import Objects, rendered


@pytest.fixture(scope="module", params=CASES, ids=lambda path: path.stem)
def objects(request: pytest.FixtureRequest) -> Objects:
    path: Path = request.param
    deployment = rendered(CASES[path])
    documents: list[dict[str, Any]] = list(yaml.safe_load_all(path.read_text()))
    assert documents == manifests(deployment), "run python -m scripts.generate_docs"
    return Objects(deployment, documents)
