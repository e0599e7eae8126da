"""Whether a checkpoint's head is its embedding. One that config.json ties may hold a head of its own all the same."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from moe_serve.base.model_config import ModelConfig
from moe_serve.model.archs.base import EMBEDDING, HEAD
from moe_serve.worker.loading.checkpoint import Checkpoint

ROWS_AT_A_TIME = 4096
log = logging.getLogger(__name__)


def settle_head(config: ModelConfig, folder: Path, dtype: torch.dtype, *, warns: bool = True) -> ModelConfig:
    """As transformers does: with both in the checkpoint, tied only if they are the same in the model's type."""
    if not config.tie_word_embeddings:
        return config
    with Checkpoint(folder) as checkpoint:
        if _same(checkpoint, dtype):
            return config
    if warns:
        log.warning(
            "%s ties head and embedding (tie_word_embeddings), but %s differs from %s in its weights: it is used",
            folder / "config.json",
            HEAD,
            EMBEDDING,
        )
    return replace(config, tie_word_embeddings=False)


def _same(checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    head, embedding = checkpoint.tensors.get(HEAD), checkpoint.tensors.get(EMBEDDING)
    if head is None or embedding is None:
        return True
    if head.shape != embedding.shape or len(head.shape) != 2:
        return False  # the loader says which of them is misshapen
    rows, columns = head.shape
    for start in range(0, rows, ROWS_AT_A_TIME):
        part = (range(start, min(start + ROWS_AT_A_TIME, rows)), range(columns))
        if not torch.equal(checkpoint.read(HEAD, part).to(dtype), checkpoint.read(EMBEDDING, part).to(dtype)):
            return False
    return True
