"""Weights that make some tokens' logits NaN or infinite: such a request fails, nobody else notices. A real server."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.support.letters import ids_of, write_letters
from tests.support.server import Server, serving
from tests.support.tiny_model import tiny_model

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]

POISON = {9: math.nan, 10: math.inf}
NAMED = "not finite"
TOKENS = 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two engines of two workers each; every expert is some rank's of the four."""
    folder: Path = tmp_path_factory.mktemp("model")
    model = tiny_model(folder, "qwen3_moe", seed=5)
    with torch.no_grad():
        for token_id, value in POISON.items():
            model.get_input_embeddings().weight[token_id] = value
    model.save_pretrained(folder, save_original_format=True)
    write_letters(folder, 131)
    with serving(str(folder), "--dtype", "float32", "-dp", "2", "-tp", "2", "-ep") as running:
        yield running


def answer(server: Server, prompt: list[int], **fields: object) -> tuple[list[int], str]:
    """Tokens of a stream, and the error that ended it."""
    tokens: list[int] = []
    for event in server.stream(prompt, max_tokens=TOKENS, ignore_eos=True, **fields):
        if "error" in event:
            return tokens, event["error"]["message"]
        tokens += ids_of(event["choices"][0]["text"])
    return tokens, ""


def test_requests_whose_logits_are_not_finite_fail_alone_and_the_server_stays_ready(server: Server) -> None:
    # No good answer may come upon a poisoned token by itself.
    bans = {"logit_bias": {str(token): -100 for token in POISON}}
    good = [[20 + number, 21, 22] for number in range(4)]
    expected = [answer(server, prompt, **bans) for prompt in good]
    assert all(len(tokens) == TOKENS for tokens, _ in expected)
    with ThreadPoolExecutor(8) as clients:
        neighbours = [clients.submit(answer, server, prompt, **bans) for prompt in good * 2]
        for poison in POISON:
            for rank in ("0", "1"):
                whole = server.post(
                    "/v1/completions",
                    {"prompt": [5, poison, 6], "max_tokens": 4, "temperature": 0},
                    {"X-data-parallel-rank": rank},
                )
                assert whole.status_code == 500, whole.text
                assert NAMED in whole.json()["error"]["message"]
            tokens, error = answer(server, [5, 6, 7], logit_bias={str(poison): 100})
            assert tokens == [poison], "the first token is chosen before it is met"
            assert NAMED in error
        assert [each.result() for each in neighbours] == expected * 2
    assert server.get("/readyz").status_code == 200
    assert [answer(server, prompt, **bans) for prompt in good] == expected
