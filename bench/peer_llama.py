"""llama.cpp by its low-level Python API, for bench.peers: one batch of all sequences per step, as its own tools do it.

The model is a GGUF file (bench/gguf_file.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp
import numpy as np

Prompts = list[list[int]]
BATCH = 2048
"""Tokens that are given to llama.cpp at once: its own default."""


def load(model: str, options: dict[str, Any]) -> Callable[[Prompts, int], Prompts]:
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.use_mmap = False  # weights in memory of its own, as the others have them
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), params)
    if not loaded:
        raise OSError(f"llama.cpp cannot load {model}")
    return Sequences(loaded, options["threads"]).generate


class Sequences:
    """A context for as many sequences, and as long ones, as the turn has; made anew where a turn differs."""

    def __init__(self, model: Any, threads: int) -> None:
        self._model, self._threads = model, threads
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._sizes, self._context = (0, 0), None
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def generate(self, prompts: Prompts, output_len: int) -> Prompts:
        self._prepare(len(prompts), len(prompts[0]) + output_len)
        last = self._prefill(prompts)
        answers = [[token] for token in last]
        for place in range(len(prompts[0]), len(prompts[0]) + output_len - 1):
            last = self._step([(token, place, number, True) for number, token in enumerate(last)])
            for answer, token in zip(answers, last, strict=True):
                answer.append(token)
        return answers

    def _prefill(self, prompts: Prompts) -> list[int]:
        """The token after each prompt. Steps end with a prompt's end or in its middle, and keep the prompts' order."""
        rows = [
            (token, place, number, place == len(prompt) - 1)
            for number, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        steps = [rows[begin : begin + BATCH] for begin in range(0, len(rows), BATCH)]
        return [token for step in steps for token in self._step(step)]

    def _step(self, rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """The most likely token after each row that asks for one; rows are (token, place, sequence, asks)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (token, place, sequence, asks) in enumerate(rows):
            batch.token[row], batch.pos[row], batch.logits[row] = token, place, asks
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        code = llama_cpp.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code}")
        asked = sum(asks for *_, asks in rows)
        if not asked:
            return []
        first = llama_cpp.llama_get_logits(self._context)
        pointer = ctypes.cast(first, ctypes.POINTER(ctypes.c_float))
        logits = np.ctypeslib.as_array(pointer, (asked, self._vocab_size))
        tokens: list[int] = logits.argmax(axis=-1).tolist()
        return tokens

    def _prepare(self, sequences: int, length: int) -> None:
        if (sequences, length) == self._sizes:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * -(-length // 256) * 256
        params.n_batch, params.n_seq_max = BATCH, sequences
        params.n_threads = params.n_threads_batch = self._threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise MemoryError(f"llama.cpp makes no context for {sequences} sequences of {length} tokens")
        self._sizes = (sequences, length)
