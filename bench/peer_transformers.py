"""transformers' batched generate, for bench.peers, with its own choice of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

Prompts = list[list[int]]


def load(model: str, options: dict[str, Any]) -> Callable[[Prompts, int], Prompts]:
    torch.set_num_threads(options["threads"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    loaded.eval()
    loaded.generation_config.eos_token_id = None  # every answer has its full length
    loaded.generation_config.pad_token_id = 0

    def generate(prompts: Prompts, output_len: int) -> Prompts:
        """All prompts are of one length, so nothing is padded."""
        with torch.inference_mode():
            both = loaded.generate(torch.tensor(prompts), max_new_tokens=output_len, do_sample=False)
        answers: Prompts = both[:, len(prompts[0]) :].tolist()
        return answers

    return generate
