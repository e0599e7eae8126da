"""argmax() in torch, or, on a CPU, by numpy: ten times as fast, and of equal values it promises the first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def argmax(logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    """As argmax.argmax(), on any device. To both a NaN is the largest value: one look at the winner finds it."""
    if logits_SV.device.type == "cpu":
        logits = logits_SV.numpy()
        ids = logits.argmax(axis=-1)
        return torch.from_numpy(ids), torch.from_numpy(np.isfinite(logits[np.arange(len(ids)), ids]))
    ids_S = logits_SV.argmax(dim=-1)
    return ids_S, logits_SV.gather(1, ids_S[:, None])[:, 0].isfinite()
