"""Real clients against a real server: each script of tests/clients, in a Python that has its client.

They want versions of libraries that do not go together with ours, so they may have a virtual environment of their own:
`pip install guidellm "lm-eval[api]" litellm langchain-openai llama-index-llms-openai` there, and its python in
TEST_CLIENTS_PYTHON. A client that is not installed is skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_serve.cli.random_model import make_model
from tests.support.server import Server, serving

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]

PYTHON = os.environ.get("TEST_CLIENTS_PYTHON", sys.executable)
SCRIPTS = Path(__file__).parents[1] / "clients"
NAME = "gpt-4o-mini"  # some clients refuse names that OpenAI does not have
CLIENTS = {
    "openai_agent": "openai",
    "langchain_client": "langchain_openai",
    "litellm_client": "litellm",
    "llama_index_client": "llama_index.llms.openai",
    "lm_eval_client": "lm_eval",
    "guidellm_client": "guidellm",
}
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_API_KEY": "x",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(folder=tmp_path_factory.mktemp("tiny") / "model", preset="tiny", arch="qwen3_moe", seed=0)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(str(folder), "--dtype", "float32", "--served-model-name", NAME) as running:
        yield running


@pytest.mark.parametrize("script", CLIENTS)
def test_client(server: Server, folder: Path, script: str, tmp_path: Path) -> None:
    module = CLIENTS[script]
    found = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module.partition('.')[0]!r}) is None)"
    if subprocess.run([PYTHON, "-c", found], timeout=60, check=False).returncode:
        pytest.skip(f"{module} is not installed for {PYTHON} (TEST_CLIENTS_PYTHON names another)")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | OFFLINE
    command = [PYTHON, str(SCRIPTS / f"{script}.py"), server.base_url, NAME, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}\nserver:\n{server.log()[-3000:]}"
