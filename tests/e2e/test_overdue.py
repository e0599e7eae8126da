"""A request that its engine has lost ends by name; one that waits in a queue for as long waits on. Real engines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from moe_serve.cli.random_model import make_model
from moe_serve.engine.overdue import LOOK_SECONDS, QUIET_SECONDS
from tests.support.forgetful import FORGOTTEN, STEP_SECONDS
from tests.support.server import Server, serving

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]

OPTIONS = (
    *("-dp", "2", "-ep", "--max-model-len", "256", "--kv-cache-memory-bytes", str(2**24)),
    *("--max-num-seqs", "1", "--max-num-batched-tokens", "64"),
    *("--distributed-executor-backend", "tests.support.forgetful:ForgetfulExecutor"),
)
TOKENS = round((2 * QUIET_SECONDS + 4) / STEP_SECONDS)
SOON_SECONDS = QUIET_SECONDS + 2 * LOOK_SECONDS + 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    model = make_model(tmp_path_factory.mktemp("model") / "tiny")
    with serving(str(model), *OPTIONS) as running:
        yield running


def pinned(rank: int) -> dict[str, str]:
    return {"X-data-parallel-rank": str(rank)}


def test_a_request_that_an_engine_has_forgotten_ends_and_names_the_rank_and_no_other_ends(server: Server) -> None:
    """On rank 0 a long answer, another that waits for it, and a lost one; on rank 1, which sleeps, a lost one too."""
    long = {"prompt": [5, 6, 7], "max_tokens": TOKENS, "ignore_eos": True}
    lost = {"prompt": [FORGOTTEN, 6], "max_tokens": 1}
    with ThreadPoolExecutor(4) as clients:
        running = clients.submit(server.post, "/v1/completions", long, pinned(0))
        time.sleep(1)
        waiting = clients.submit(server.post, "/v1/completions", {**long, "max_tokens": 1}, pinned(0))
        began = time.monotonic()
        swallowed = [clients.submit(server.post, "/v1/completions", lost, pinned(rank)) for rank in (0, 1)]
        for rank, each in enumerate(swallowed):
            answer = each.result()
            assert time.monotonic() - began < SOON_SECONDS
            assert answer.status_code == 503
            assert f"DP rank {rank} does not know this request any more" in answer.json()["error"]["message"]
        assert not running.done()
        assert not waiting.done()
        for each, tokens in ((running, TOKENS), (waiting, 1)):
            answer = each.result()
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == tokens
        assert time.monotonic() - began > 2 * QUIET_SECONDS, "the wait was long enough to be asked about twice"
    assert server.get("/readyz").status_code == 200
    assert server.log().count("gave up request") == 2
