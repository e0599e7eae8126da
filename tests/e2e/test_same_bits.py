"""On the compiled kernels an answer in bfloat16 does not depend on what else is served: compared to the last bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from moe_kernels.paths import available

from moe_serve import LLM, SamplingParams
from tests.support.letters import ids_of, write_letters
from tests.support.server import Server, serving
from tests.support.tiny_model import tiny_model

ASKED = SamplingParams(max_tokens=24, temperature=0.0, logprobs=3, ignore_eos=True)
LENGTHS = (7, 41, 1, 90)
PROMPTS = [[3 + (seed * 17 + at * (seed + 5)) % 120 for at in range(length)] for seed, length in enumerate(LENGTHS)]
Answer = list[tuple[int, float]]
"""Tokens, and the logarithm of each one's probability: a float, in which one bit of any layer would show."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(folder, "qwen2_moe", seed=5, hidden_size=64, expert_size=32, vocab_size=144)
    write_letters(folder, 144)
    return folder


def answers(llm: LLM, prompts: Sequence[list[int]]) -> list[Answer]:
    found = []
    for request in llm.generate(list(prompts), ASKED, show_progress=False):
        (output,) = request.outputs
        assert output.logprobs is not None
        found.append([(id_, each.logprob) for id_, each in zip(output.token_ids, output.logprobs, strict=True)])
    return found


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("path", available()[:1])
def test_alone_together_again_cut_and_preempted(folder: Path, path: str) -> None:
    def started(**options: object) -> LLM:
        return LLM(str(folder), dtype="bfloat16", kernels=path, max_model_len=128, **options)

    with started() as llm:
        alone = [answers(llm, [prompt])[0] for prompt in PROMPTS]
        together = answers(llm, PROMPTS)
        hit = answers(llm, PROMPTS)  # their blocks are there now
    assert together == alone
    assert hit == alone
    tight = {"max_num_batched_tokens": 16, "kv_cache_memory_bytes": kv_bytes(blocks=11)}
    with started(**tight, enable_prefix_caching=False) as llm:
        assert answers(llm, PROMPTS) == alone, "cut into chunks of 16, and preempted: together they need 17 blocks"


def kv_bytes(blocks: int) -> int:
    """Of 16 tokens of 2 layers with 2 KV heads of 16 dimensions, k and v, 2 bytes each."""
    return blocks * 16 * 2 * 2 * 16 * 2 * 2


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("path", available()[:1])
def test_through_rearrangements_of_packed_experts(folder: Path, path: str) -> None:
    """`torch_a2a` adds a token's terms in the same order wherever its experts live."""
    moves = {"window_size": 20, "step_interval": 24, "num_redundant_experts": 2, "policy": "shuffle", "min_gain": 0}
    world = ["--dtype", "bfloat16", "--kernels", path, "-dp", "2", "-ep", "--all2all-backend", "torch_a2a"]
    with serving(str(folder), *world) as server:
        expected = over_http(server)
    with serving(str(folder), *world, "--enable-eplb", "--eplb-config", json.dumps(moves)) as server:
        for _ in range(40):
            assert over_http(server) == expected
            done = [each for each in server.get("/eplb").json()["history"] if "epoch" in each and not each["failure"]]
            if len(done) >= 4:
                break
        assert len(done) >= 4, server.log()
        assert sum(each["moved_experts"] for each in done) > 0


def over_http(server: Server) -> list[Answer]:
    def answer(prompt: list[int]) -> Answer:
        choice = server.complete(prompt, max_tokens=48, temperature=0, logprobs=1, ignore_eos=True)["choices"][0]
        return list(zip(ids_of(choice["text"]), choice["logprobs"]["token_logprobs"], strict=True))

    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        return list(clients.map(answer, PROMPTS))
