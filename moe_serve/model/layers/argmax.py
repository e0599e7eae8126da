"""The most likely token of each row of logits, and which rows have none: one look at the vocabulary for both."""

from __future__ import annotations

from moe_kernels.argmax import argmax as compiled
from moe_kernels.argmax import reference
from torch import Tensor


def argmax(logits_SV: Tensor, path: str | None = None) -> tuple[Tensor, Tensor]:
    """Ids (S,) int64, of equal logits the lowest, and (S,) bool: no NaN, no +inf, and not -inf alone.

    `logits_SV` float32; `path` of moe_kernels, torch's own operations (numpy's on a CPU) if None.
    """
    return reference.argmax(logits_SV) if path is None else compiled.argmax(path, logits_SV)
