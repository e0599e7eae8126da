"""Greedy tokens over HTTP equal transformers' in float32, however the model is spread over ranks.

Every architecture in every world; backends and placements so that each pair occurs (all combinations: --full-grid).
"""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet

from moe_serve.model.all2all.limits import backends_for
from tests.support.letters import ids_of, write_letters
from tests.support.server import Server, serving
from tests.support.tiny_model import ARCHS, tiny_model

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

WORLDS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]
BACKENDS = backends_for("cpu")
PLACEMENTS = ["linear", "round_robin"]
DAILY = {(2, 1): ("qwen2_moe",)}
VOCAB = 131
NUM_TOKENS = 48
LENGTHS = [1, 2, 7, 16, 33, 80, 129, 150]


@dataclass(frozen=True)
class Way:
    """One way to spread a model. `placement` None: no expert parallelism, every expert cut by width."""

    arch: str
    dp: int
    tp: int
    backend: str
    placement: str | None

    def options(self) -> list[str]:
        spread = [] if self.placement is None else ["-ep", "--expert-placement-strategy", self.placement]
        return ["-dp", str(self.dp), "-tp", str(self.tp), "--all2all-backend", self.backend, *spread]

    def marked(self) -> ParameterSet:
        """Each takes ten seconds on two cores: one is left in the daily run, beside the logits of test_archs."""
        daily = self.arch in DAILY.get((self.dp, self.tp), ())
        return pytest.param(self, id=str(self), marks=() if daily else pytest.mark.long)

    def __str__(self) -> str:
        return f"{self.arch}-dp{self.dp}-tp{self.tp}-{self.backend}-{self.placement or 'cut'}"


@dataclass(frozen=True)
class Checkpoint:
    """A folder, and what transformers answers to each of `prompts`."""

    folder: Path
    prompts: list[list[int]]
    answers: list[list[int]]


def covering_ways() -> list[Way]:
    """Each architecture in each world once; over those, each backend with each placement (and without).

    A world's backend is another one for each architecture, though there may be as many worlds as backends.
    """
    spreads = [(backend, placement) for placement in [*PLACEMENTS, None] for backend in BACKENDS]
    ways = enumerate(itertools.product(enumerate(ARCHS), WORLDS))
    return [Way(arch, dp, tp, *spreads[(way + row) % len(spreads)]) for way, ((row, arch), (dp, tp)) in ways]


def all_ways() -> list[Way]:
    return [
        Way(arch, *world, *rest)
        for arch in ARCHS
        for world in WORLDS
        for rest in itertools.product(BACKENDS, PLACEMENTS)
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "way" in metafunc.fixturenames:
        ways = covering_ways() + (all_ways() if metafunc.config.getoption("--full-grid") else [])
        metafunc.parametrize("way", [each.marked() for each in sorted(set(ways), key=str)])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    made = {arch: make_checkpoint(tmp_path_factory.mktemp(arch), arch) for arch in ARCHS}
    made["sharded"] = make_checkpoint(tmp_path_factory.mktemp("sharded"), "mixtral", max_shard_size="60KB")
    return made


def make_checkpoint(folder: Path, arch: str, **options: Any) -> Checkpoint:
    """A random checkpoint with norms and biases random too, and transformers' greedy answers in float32."""
    model = tiny_model(folder, arch, seed=3, **options)
    write_letters(folder, VOCAB)
    numbers = random.Random(arch)
    prompts = [[numbers.randrange(3, VOCAB) for _ in range(length)] for length in LENGTHS]
    answers = []
    with torch.inference_mode():
        for prompt in prompts:
            whole = model.generate(
                torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            answers.append(whole[0, len(prompt) :].tolist())
    return Checkpoint(folder, prompts, answers)


def plain_answers(server: Server, prompts: list[list[int]]) -> list[list[int]]:
    """All prompts at once, each answered in one piece."""

    def answer(prompt: list[int]) -> list[int]:
        body = server.complete(prompt, max_tokens=NUM_TOKENS, ignore_eos=True)
        return ids_of(body["choices"][0]["text"])

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(answer, prompts))


def streamed_answers(server: Server, prompts: list[list[int]]) -> list[list[int]]:
    """All prompts at once, each streamed."""

    def answer(prompt: list[int]) -> list[int]:
        events = server.stream(prompt, max_tokens=NUM_TOKENS, ignore_eos=True)
        return ids_of("".join(choice["text"] for event in events for choice in event["choices"]))

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(answer, prompts))


def test_tokens_over_http_equal_those_of_transformers(checkpoints: dict[str, Checkpoint], way: Way) -> None:
    checkpoint = checkpoints[way.arch]
    with serving(str(checkpoint.folder), "--dtype", "float32", *way.options()) as server:
        assert plain_answers(server, checkpoint.prompts) == checkpoint.answers
        assert streamed_answers(server, checkpoint.prompts) == checkpoint.answers


@pytest.mark.parametrize(
    ("name", "world"),
    [
        pytest.param("qwen2_moe", (2, 1), id="qwen2_moe-dp2", marks=pytest.mark.long),
        pytest.param("olmoe", (1, 2), id="olmoe-tp2", marks=pytest.mark.long),
    ],
)
def test_a_prompt_cut_into_chunks_gives_the_same_tokens(
    checkpoints: dict[str, Checkpoint], name: str, world: tuple[int, int]
) -> None:
    checkpoint = checkpoints[name]
    options = Way(name, *world, "allgather_reducescatter", "linear").options()
    with serving(str(checkpoint.folder), "--dtype", "float32", "--max-num-batched-tokens", "64", *options) as server:
        assert plain_answers(server, checkpoint.prompts) == checkpoint.answers


@pytest.mark.long  # in the daily run: tests/worker/test_runner.py, without HTTP
@pytest.mark.parametrize("dp", [1, 2])
def test_a_request_that_was_preempted_gives_the_same_tokens(checkpoints: dict[str, Checkpoint], dp: int) -> None:
    checkpoint = checkpoints["qwen3_moe"]
    block_bytes = 2 * 2 * 16 * 2 * 24 * 4  # layers, k and v, tokens, KV heads, head dimension, float32
    options = Way("qwen3_moe", dp, 1, "torch_a2a", "linear" if dp > 1 else None).options()
    with serving(
        str(checkpoint.folder),
        *("--dtype", "float32", "--max-model-len", "256", "--block-size", "16"),
        *("--kv-cache-memory-bytes", str(16 * block_bytes)),  # no more than one sequence of full length needs
        *options,
    ) as server:
        assert plain_answers(server, checkpoint.prompts) == checkpoint.answers
        counts = [line for line in server.get("/metrics").text.splitlines() if "num_preemptions_total{" in line]
        assert sum(float(line.rsplit(" ", 1)[1]) for line in counts) > 0, counts


@pytest.mark.long
def test_a_sharded_checkpoint_gives_the_same_tokens(checkpoints: dict[str, Checkpoint]) -> None:
    checkpoint = checkpoints["sharded"]
    assert len(list(checkpoint.folder.glob("*.safetensors"))) > 2
    options = Way("mixtral", 2, 1, "allgather_reducescatter", "round_robin").options()
    with serving(str(checkpoint.folder), "--dtype", "float32", *options) as server:
        assert plain_answers(server, checkpoint.prompts) == checkpoint.answers
