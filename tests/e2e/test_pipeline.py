"""Layers cut over pipeline stages: the same tokens, also while experts move; a stage that dies is named."""

from __future__ import annotations

import json
import re

import pytest

from moe_serve import LLM, SamplingParams
from tests.e2e.test_parity import NUM_TOKENS, Checkpoint, make_checkpoint, plain_answers, streamed_answers
from tests.support.load import Load
from tests.support.server import Server, serving

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]

LAYERS = 5
BLOCK_BYTES = 3 * 2 * 16 * 2 * 24 * 4  # layers of the longer stage, k and v, tokens, KV heads, head dimension, float32
WAYS = [
    ("-pp", "2"),
    ("-pp", "3"),
    ("-pp", "2", "-tp", "2"),
    ("-pp", "2", "-dp", "2", "-ep", "--max-parallel-loading-workers", "1", "--disable-nccl-for-dp-synchronization"),
    ("-pp", "2", "-dp", "2", "--all2all-backend", "torch_padded"),
    ("-pp", "2", "--max-num-batched-tokens", "64", "--max-num-seqs", "4"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Its head is its embedding, so both ends of a pipeline hold it."""
    folder = tmp_path_factory.mktemp("deep")
    return make_checkpoint(folder, "qwen3_moe", num_hidden_layers=LAYERS, tie_word_embeddings=True)


@pytest.mark.parametrize("options", WAYS, ids=" ".join)
def test_tokens_equal_those_of_transformers(checkpoint: Checkpoint, options: tuple[str, ...]) -> None:
    with serving(str(checkpoint.folder), "--dtype", "float32", *options) as server:
        assert plain_answers(server, checkpoint.prompts) == checkpoint.answers
        assert streamed_answers(server, checkpoint.prompts) == checkpoint.answers


def test_a_request_that_was_preempted_gives_the_same_tokens(checkpoint: Checkpoint) -> None:
    room = ("--max-model-len", "256", "--block-size", "16", "--kv-cache-memory-bytes", str(16 * BLOCK_BYTES))
    with serving(str(checkpoint.folder), "--dtype", "float32", "-pp", "2", *room) as server:
        assert plain_answers(server, checkpoint.prompts) == checkpoint.answers
        assert _figure(server, "num_preemptions_total") > 0


@pytest.mark.parametrize("tp", ["1", "2"])
def test_experts_move_inside_each_stage_and_no_token_changes(checkpoint: Checkpoint, tp: str) -> None:
    balancing = {
        "window_size": 20,
        "step_interval": 16,
        "num_redundant_experts": 2,
        "policy": "shuffle",
        "min_gain": 0,
        "max_bytes_per_step": 1 << 14,
    }
    world = ("-pp", "2", "-dp", "2", "-tp", tp, "-ep", "--enable-eplb", "--eplb-config", json.dumps(balancing))
    with serving(str(checkpoint.folder), "--dtype", "float32", *world) as server:
        for _ in range(30):
            assert plain_answers(server, checkpoint.prompts) == checkpoint.answers
            if _figure(server, "eplb_rebalances_total") >= 10:
                break
        assert _figure(server, "eplb_rebalances_total") >= 10, server.log()
        surface = server.get("/eplb").json()
        assert surface["window_load"] is not None
        moved = [entry for entry in surface["history"] if entry["moved_experts"]]
        assert moved, surface["history"]
        # Every layer's rows are counted, whichever stage has it.
        loads = surface["window_load"]
        assert len(loads) == LAYERS
        assert len({json.dumps(sum(layer)) for layer in loads}) == 1, "as many rows in each layer"


def test_a_worker_of_a_stage_that_is_killed_is_named_and_everything_ends(checkpoint: Checkpoint) -> None:
    server = Server(str(checkpoint.folder), "-pp", "2", "--kv-cache-memory-bytes", str(16 * 2**20))
    try:
        load = Load(server.wait_ready(), count=4, max_tokens=400).start()
        workers = [each for each in server.family() if "moe_serve.worker.process" in each.cmdline()]
        assert len(workers) == 2
        workers[0].kill()
        assert server.process.wait(15) == 1
        assert not load.wait_ended(5)
        assert re.search(r"worker dp 0 pp 0 tp 0 \(pid \d+ on .*\) died", server.log()), server.log()
    finally:
        server.end()


def test_an_llm_of_stages_gives_the_same_tokens(checkpoint: Checkpoint) -> None:
    with LLM(str(checkpoint.folder), dtype="float32", pipeline_parallel_size=2) as llm:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in checkpoint.prompts], params)
        assert [list(output.outputs[0].token_ids) for output in outputs] == checkpoint.answers


def _figure(server: Server, name: str) -> float:
    """The sum over the engines."""
    found = re.findall(rf"^moe_serve:{name}\{{[^}}]*\}} ([0-9.e+]+)", server.get("/metrics").text, re.M)
    return sum(map(float, found))
