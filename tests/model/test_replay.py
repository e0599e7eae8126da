"""Recorded decode steps: the bits of steps that run operation by operation, for as long as what is recorded fits."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from moe_kernels.paths import available

from moe_serve.model.replay import MAX_ROWS, ReplayedDecoder
from tests.support.forward import all_logits, alone, load_decoder
from tests.support.tiny_model import ARCHS, tiny_model

SIZES = {"expert_size": 32, "hidden_size": 64, "vocab_size": 144}
PROMPTS = [[5, 9, 2, 77, 31, 8, 100, 3, 64, 12, 7], [101, 4], list(range(3, 70)), [9]]
PATH = available()[0]


@pytest.mark.parametrize("path", available())
@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
@torch.inference_mode()
def test_replayed_steps_have_the_same_bits(tmp_path: Path, arch: str, path: str) -> None:
    """Four rows, then fewer and fewer; the longest prompt outgrows the blocks there was room for several times."""
    tiny_model(tmp_path, arch, seed=3, **SIZES)
    decoder = load_decoder(tmp_path, alone(), dtype=torch.bfloat16, path=path)
    replayed = ReplayedDecoder(decoder)
    expected = all_logits(decoder, [PROMPTS], chunk=1)
    got = all_logits(decoder, [PROMPTS], chunk=1, forward=replayed.forward)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    steps = max(map(len, PROMPTS))
    assert steps - 12 <= replayed.num_replayed < steps - 3
    before = replayed.num_replayed  # another cache at other addresses
    again = all_logits(decoder, [PROMPTS], chunk=1, forward=replayed.forward)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
    assert replayed.num_replayed > before


@torch.inference_mode()
def test_steps_of_several_tokens_and_of_many_rows_run_as_ever(tmp_path: Path) -> None:
    tiny_model(tmp_path, "mixtral", seed=3, **SIZES)
    decoder = load_decoder(tmp_path, alone(), dtype=torch.bfloat16, path=PATH)
    replayed = ReplayedDecoder(decoder)
    for prompts, chunk in (([[5, 9, 2, 77], [4, 3]], 2), ([[7, 9]] * (MAX_ROWS + 1), 1)):
        expected = all_logits(decoder, [prompts], chunk=chunk)
        got = all_logits(decoder, [prompts], chunk=chunk, forward=replayed.forward)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert replayed.num_replayed == 0


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("path", [None, PATH])
@torch.inference_mode()
def test_a_model_that_cannot_be_replayed_is_right_and_says_so(
    tmp_path: Path, arch: str, path: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """OLMoE's norm over all heads and Qwen2-MoE's gate of the shared expert are torch's own operations."""
    tiny_model(tmp_path, arch, seed=3, **SIZES)
    decoder = load_decoder(tmp_path, alone(), dtype=torch.bfloat16, path=path)
    replayed = ReplayedDecoder(decoder)
    with caplog.at_level(logging.INFO, "moe_serve.model.replay"):
        got = all_logits(decoder, [PROMPTS], chunk=1, forward=replayed.forward)
    expected = all_logits(decoder, [PROMPTS], chunk=1)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    own = path is not None and arch in ("olmoe", "qwen2_moe")
    assert (replayed.num_replayed > 0) == (path is not None and not own)
    told = [record.message for record in caplog.records if record.name == "moe_serve.model.replay"]
    assert [line.startswith("steps are not replayed: ") for line in told] == [True] * own
