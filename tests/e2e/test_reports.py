"""How an engine stands is told by time: what it says is true also when it has nothing to say to anybody."""

from __future__ import annotations

import time

import httpx
import pytest

from moe_serve.cli.random_model import make_model
from tests.support.load import Load
from tests.support.server import Server, serving

pytestmark = [pytest.mark.ranks, pytest.mark.long]

OPTIONS = (
    "-dp",
    "2",
    "-ep",
    "--max-model-len",
    "1024",
    "--kv-cache-memory-bytes",
    str(16 * 2**20),
    "--shutdown-timeout",
    "1",
)
FRESH_SECONDS = 2.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    model = make_model(tmp_path_factory.mktemp("model") / "tiny")
    with serving(str(model), *OPTIONS, "--all2all-backend", "torch_padded") as running:
        yield running


def figure(server: Server, name: str, engine: int) -> float:
    """A metric of an engine."""
    for line in server.get("/metrics").text.splitlines():
        if line.startswith(f"moe_serve:{name}{{") and f'engine="{engine}"' in line:
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no {name} of engine {engine}")


def test_an_engine_whose_last_request_was_aborted_goes_on_reporting_its_dummy_steps(server: Server) -> None:
    with httpx.Client(base_url=server.base_url, timeout=60) as client:
        body = {"prompt": "one", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body, headers={"X-data-parallel-rank": "1"}) as leaving:
            lines = leaving.iter_lines()  # kept, or the stream closes with it
            assert next(lines).startswith("data: ")
            assert figure(server, "num_requests_running", 1) == 1
            load = Load(server, count=1).start()
    deadline = time.monotonic() + FRESH_SECONDS
    while figure(server, "num_requests_running", 1) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert figure(server, "num_requests_running", 1) == 0
    before = figure(server, "dummy_steps_total", 1)
    time.sleep(FRESH_SECONDS)
    assert figure(server, "dummy_steps_total", 1) > before
    assert all(stream.ended is None for stream in load.streams), "the other engine's work must outlast the test"
    # Rank 1 brings no rows: all that it sends in its dummy steps is padding, one row for each of rank 0's.
    assert figure(server, "dp_padding_tokens_total", 1) > 0
    assert figure(server, "dp_padding_tokens_total", 0) < figure(server, "dp_padding_tokens_total", 1)


def test_what_never_changes_is_shown_although_it_is_told_once(server: Server) -> None:
    assert 0 < figure(server, "kv_cache_usage_perc", 0) < 1
    assert figure(server, "load_phase_seconds", 1) >= 0
