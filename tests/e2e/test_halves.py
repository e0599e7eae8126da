"""A real server whose steps are cut in halves that take turns: transformers' tokens for all thresholds and layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_parity import Checkpoint, make_checkpoint, plain_answers, streamed_answers
from tests.e2e.test_rebalance import applied, options
from tests.support.server import serving

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen2_moe", num_key_value_heads=1)


@pytest.mark.parametrize(
    ("dp", "tp", "backend", "thresholds", "more"),
    [
        (2, 1, "shm", (1, 1), ["-ep"]),
        (1, 2, "torch_a2a", (4, 1), ["-ep", "--expert-placement-strategy", "round_robin"]),
        (2, 2, "shm", (1, 16), ["-ep", "-dcp", "2"]),
        (2, 2, "allgather_reducescatter", (2, 1000), []),
        (1, 2, "naive", (1, 1), ["-pp", "2"]),
    ],
)
def test_tokens_over_http_equal_those_of_transformers(
    checkpoint: Checkpoint, dp: int, tp: int, backend: str, thresholds: tuple[int, int], more: list[str]
) -> None:
    decode, prefill = map(str, thresholds)
    world = ("-dp", str(dp), "-tp", str(tp), "--all2all-backend", backend, "--dtype", "float32", *more)
    halving = ("--enable-dbo", "--dbo-decode-token-threshold", decode, "--dbo-prefill-token-threshold", prefill)
    with serving(str(checkpoint.folder), *world, *halving, "--max-num-batched-tokens", "96") as server:
        assert plain_answers(server, checkpoint.prompts) == checkpoint.answers
        assert streamed_answers(server, checkpoint.prompts) == checkpoint.answers


def test_experts_move_and_no_token_changes(checkpoint: Checkpoint) -> None:
    halving = ("--enable-dbo", "--dbo-decode-token-threshold", "1", "--dbo-prefill-token-threshold", "1")
    with serving(str(checkpoint.folder), *options(2, "shuffle", redundant=2), *halving) as server:
        for _ in range(20):
            assert plain_answers(server, checkpoint.prompts) == checkpoint.answers
            done = applied(server)
            if len(done) >= 5:
                break
        assert len(done) >= 5, server.log()
        assert sum(entry["moved_experts"] for entry in done) > 0
