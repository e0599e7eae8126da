"""A real server whose ranks share a KV cache: transformers' tokens, from shared prefixes and after preemption too, in
memory that falls by the ranks that share it."""

from __future__ import annotations

import re

import pytest

from tests.e2e.test_parity import Checkpoint, make_checkpoint, plain_answers, streamed_answers
from tests.e2e.test_rebalance import applied, options
from tests.support.server import serving

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Checkpoint]:
    """By the number of KV heads."""
    return {
        heads: make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_moe", num_key_value_heads=heads)
        for heads in (1, 2)
    }


@pytest.mark.parametrize(("dp", "tp", "kv_heads", "dcp"), [(1, 2, 1, 2), (1, 4, 1, 4), (2, 2, 1, 2)])
def test_tokens_over_http_equal_those_of_transformers(
    checkpoints: dict[int, Checkpoint], dp: int, tp: int, kv_heads: int, dcp: int
) -> None:
    checkpoint = checkpoints[kv_heads]
    world = ("-dp", str(dp), "-tp", str(tp), "-ep", "--decode-context-parallel-size", str(dcp), "--dtype", "float32")
    with serving(str(checkpoint.folder), *world, "--max-num-batched-tokens", "64") as server:
        assert plain_answers(server, checkpoint.prompts) == checkpoint.answers
        assert streamed_answers(server, checkpoint.prompts) == checkpoint.answers  # from blocks that are there already


def test_experts_move_and_no_token_changes(checkpoints: dict[int, Checkpoint]) -> None:
    """Over two pairs, each with one of two heads."""
    asked = (*options(1, "shuffle", redundant=2, tp=4), "-dcp", "2")
    with serving(str(checkpoints[2].folder), *asked) as server:
        for _ in range(20):
            assert plain_answers(server, checkpoints[2].prompts) == checkpoints[2].answers
            done = applied(server)
            if len(done) >= 5:
                break
        assert len(done) >= 5, server.log()
        assert sum(entry["moved_experts"] for entry in done) > 0


def test_a_cache_of_the_same_bytes_has_room_for_twice_the_tokens(checkpoints: dict[int, Checkpoint]) -> None:
    """And where it is too small for all at once, sequences that are set back give the same tokens later."""
    checkpoint, rooms = checkpoints[1], {}
    for dcp in (1, 2):
        world = ("-tp", "2", "--decode-context-parallel-size", str(dcp), "--dtype", "float32")
        with serving(
            str(checkpoint.folder), *world, "--kv-cache-memory-bytes", "100000", "--max-model-len", "256"
        ) as server:
            assert plain_answers(server, checkpoint.prompts) == checkpoint.answers
            counts = [line for line in server.get("/metrics").text.splitlines() if "num_preemptions_total{" in line]
            assert sum(float(line.split()[-1]) for line in counts) > 0
            log = server.log()
        found = re.search(r"KV cache: (\d+) tokens", log)
        assert found is not None
        rooms[dcp] = int(found[1])
    assert rooms[2] in (2 * rooms[1], 2 * rooms[1] + 16)
    assert "tensor parallel 2 (KV cache shared by 2)" in log
