"""The real openai client against a real server: two data-parallel ranks, experts spread, a key, a tiny checkpoint."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import httpx
import openai
import pytest

from moe_serve.cli.random_model import make_model
from tests.support.client_checks import CHECKS, Check
from tests.support.server import Server, serving

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

KEY = "a key for tests"
NAME = "tiny"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder=folder / "model", preset="tiny", arch="qwen3_moe", seed=0)
    options = ["--dtype", "float32", "-dp", "2", "-ep", "--served-model-name", NAME]
    with serving(str(folder / "model"), *options, environment=os.environ | {"MOE_SERVE_API_KEY": KEY}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY, max_retries=0, timeout=60)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_endpoint(server: Server, client: openai.OpenAI, check: Check) -> None:
    check(client, server.base_url, NAME)


def test_balancing_that_is_off_says_so(server: Server) -> None:
    answer = httpx.get(f"{server.base_url}/eplb", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 400
    assert "--enable-eplb" in answer.json()["error"]["message"]
    assert server.get("/metrics").status_code == 200


def test_the_printed_curl_line_works(server: Server) -> None:
    arguments = [part.replace("$MOE_SERVE_API_KEY", KEY) for part in server.curl_line()]
    done = subprocess.run([*arguments, "-s"], capture_output=True, text=True, timeout=60, check=True)
    assert '"finish_reason"' in done.stdout
