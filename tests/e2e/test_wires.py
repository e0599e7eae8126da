"""A real server whose experts are reached through doubles of libraries for GPUs: transformers' tokens, and EPLB."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.test_parity import Checkpoint, make_checkpoint, plain_answers
from tests.e2e.test_rebalance import applied, options
from tests.support.doubles import LIBRARIES
from tests.support.doubles.serve import COMMAND, WORKER
from tests.support.server import serving

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]

EXPERTS = 12
"""With the redundant ones as many on each of four ranks."""
LEAST_ROOM = ("--max-num-batched-tokens", "64", *WORKER)
"""The low-latency double has room for the worst case, as its library has, and fills it in Python."""

WIDE = {"deepep_low_latency", "pplx_garden"}
"""Over four ranks; the others over two, which starts twice as fast."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen2_moe", num_experts=EXPERTS)


@pytest.mark.parametrize("backend", LIBRARIES)
def test_tokens_over_http_equal_those_of_transformers_while_experts_move(checkpoint: Checkpoint, backend: str) -> None:
    tp = 2 if backend in WIDE else 1
    asked = (*options(2, "shuffle", redundant=4, tp=tp), "--all2all-backend", backend, *LEAST_ROOM)
    with serving(str(checkpoint.folder), *asked, command=COMMAND) as server:
        assert {each["all2all_backend"] for each in server.get("/config").json()["running"].values()} == {backend}
        for _ in range(40):
            assert plain_answers(server, checkpoint.prompts) == checkpoint.answers
            done = applied(server)
            if len(done) >= 5:
                break
        assert len(done) >= 5, server.log()
        assert sum(entry["moved_experts"] for entry in done) > 0


def test_rows_of_eight_bits_change_little(tmp_path: Path) -> None:
    """Next to none of the first tokens; what follows parts sooner or later, or nothing was quantised."""
    checkpoint = make_checkpoint(tmp_path, "qwen2_moe", num_experts=EXPERTS, hidden_size=128)
    backend = ("--all2all-backend", "deepep_low_latency", "--all2all-dtype", "fp8")
    asked = ("--dtype", "float32", "-dp", "2", "-ep", *backend, *LEAST_ROOM)
    with serving(str(checkpoint.folder), *asked, command=COMMAND) as server:
        answers = plain_answers(server, checkpoint.prompts)
    firsts = [answer[0] == right[0] for answer, right in zip(answers, checkpoint.answers, strict=True)]
    assert sum(firsts) >= len(firsts) - 1
    assert answers != checkpoint.answers
