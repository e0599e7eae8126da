"""Whole models on the compiled operations: near transformers, and the same bits whatever is beside a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from moe_kernels.paths import available

from tests.support.forward import all_logits, alone, load_decoder
from tests.support.tiny_model import ARCHS, tiny_model

SIZES = {"expert_size": 32, "hidden_size": 64, "vocab_size": 144}
PROMPTS = [[5, 9, 2, 77, 31, 8, 100, 3, 64, 12, 7], [101, 4], list(range(3, 70)), [9]]


@pytest.mark.parametrize("path", available()[:1])  # all of them: tests/kernels
@pytest.mark.parametrize("arch", ARCHS)
@torch.inference_mode()
def test_logits_are_near_and_do_not_depend_on_the_batch(tmp_path: Path, arch: str, path: str) -> None:
    model = tiny_model(tmp_path, arch, seed=3, tie_word_embeddings=arch == "qwen3_moe", **SIZES)
    decoder = load_decoder(tmp_path, alone(), dtype=torch.bfloat16, path=path)
    together = all_logits(decoder, [PROMPTS])
    in_torch = all_logits(load_decoder(tmp_path, alone(), dtype=torch.bfloat16), [PROMPTS])
    expected = torch.cat([model(torch.tensor([prompt])).logits[0] for prompt in PROMPTS])
    # Of most positions: a rounding that lets another expert into the top k shows up as a large error, in torch too.
    error, torchs_error = ((torch.cat(each) - expected).abs().amax(1).quantile(0.85) for each in (together, in_torch))
    assert error <= 1.5 * torchs_error + 0.01
    for prompt, logits in zip(PROMPTS, together, strict=True):
        assert torch.equal(all_logits(decoder, [[prompt]])[0], logits), "alone"
    for chunk in (1, 5, 16):
        for logits, again in zip(together, all_logits(decoder, [PROMPTS], chunk=chunk), strict=True):
            assert torch.equal(again, logits), chunk
