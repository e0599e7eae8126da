"""A model folder with a tokenizer, and a server on fake engines that a module's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from moe_serve.api.state import ApiState
from tests.support.fake_engines import FakeEngines
from tests.support.http_server import engines_of, make_state, serving
from tests.support.tokenizer_folders import write_folder


@dataclass(frozen=True, slots=True)
class Served:
    """A running server and what is behind it."""

    url: str
    state: ApiState
    engines: FakeEngines
    client: openai.OpenAI

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.client.api_key}"}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def running(model_folder: Path) -> Iterator[Served]:
    state = make_state(model_folder, api_key="sesame", max_body_bytes=200_000)
    with serving(state) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="sesame", max_retries=0, timeout=30)
        yield Served(url, state, engines_of(state), client)
        client.close()


@pytest.fixture
def served(running: Served) -> Iterator[Served]:
    """The module's server, with engines that behave."""
    yield running
    running.engines.calm()
    running.state.draining = False
    assert running.state.admission.num_waiting == 0, "a request left its place taken"
