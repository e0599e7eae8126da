"""The paged KV cache of one rank: how large a block is, the room for it on a device, and the tensors themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_serve.base.config import Config
from moe_serve.model.context import LayerKV, TokenKV
from moe_serve.worker.kv_room import Room


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one rank keeps for every token, layer by layer. A block of `block_size` tokens lies on `sharing` ranks."""

    layers: tuple[TokenKV, ...]
    block_size: int
    dtype: torch.dtype
    sharing: int = 1

    @property
    def kept_tokens(self) -> int:
        """Of a block, on one rank."""
        return self.block_size // self.sharing

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, k and v of all layers."""
        return sum(kept.num_elements for kept in self.layers) * self.dtype.itemsize * self.kept_tokens

    def allocate(self, num_blocks: int, device: torch.device) -> tuple[LayerKV, ...]:
        """One pair of tensors per layer; zeros, since a masked score of a stray NaN would still be NaN."""
        slots = num_blocks * self.kept_tokens

        def zeros(heads: int, dim: int) -> Tensor:
            return _zeros((slots, heads, dim), self.dtype, device)

        return tuple(
            LayerKV(zeros(kept.num_kv_heads, kept.k_dim), zeros(kept.num_kv_heads, kept.v_dim)) for kept in self.layers
        )


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU memory that is zero because nobody has touched it: torch.zeros would write, and so take, all of it."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    untouched = torch.from_numpy(np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8))
    return untouched.view(dtype).view(size)


def cuda_room(config: Config, device: torch.device, *, num_ranks: int, reserve: int) -> Room:
    """What the share of the device leaves after all that is on it and `reserve` for activations of each rank."""
    free, total = torch.cuda.mem_get_info(device)
    share = 1.0 if config.cache.kv_cache_memory_bytes is not None else config.cache.gpu_memory_utilization
    source = (
        f"gpu_memory_utilization {share:g} of {total:,} bytes on {device}, less what is in use, divided by {num_ranks} "
        f"ranks on it, less {reserve:,} for activations"
    )
    return Room(int(free - (1 - share) * total) // num_ranks - reserve, source)
