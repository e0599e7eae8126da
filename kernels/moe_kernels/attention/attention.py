"""Causal attention over a paged cache of keys and values, nothing gathered."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels.paths import ATTENTION, empty, run


def attention(
    path: str,
    q_THd: Tensor,
    k_NGd: Tensor,
    v_NGd: Tensor,
    blocks: Tensor,
    sequences_S4: Tensor,
    *,
    block_size: int,
    scale: float,
) -> Tensor:
    """(T, H, d) bfloat16: each new token against the positions of its sequence up to its own, in one softmax.

    `q_THd` bfloat16, heads contiguous; `k_NGd`, `v_NGd` (slots, G, d) bfloat16, contiguous, the new tokens' already in
    them, H a multiple of G; position p of a sequence is in slot blocks[p // block_size] * block_size + p % block_size
    of its own part of `blocks` (int32). `sequences_S4` int64, a sequence in each row: its first row of q, how many
    rows, the position of the first one, and where its blocks begin. Rows of no sequence are left as they come.

    Online softmax in float32 over chunks of 32 positions, those of 1,024 joined in order (as in FlashDecoding, but with
    borders that are fixed from position 0): a token's bits depend on its own sequence and the path alone, not on the
    batch, on how a prompt is cut, or on threads.
    """
    (num_tokens, heads, head_dim), kv_heads = q_THd.shape, k_NGd.shape[1]
    assert q_THd.dtype == k_NGd.dtype == v_NGd.dtype == torch.bfloat16
    assert heads % kv_heads == 0
    assert k_NGd.is_contiguous()
    assert v_NGd.is_contiguous()
    assert blocks.dtype == torch.int32
    assert sequences_S4.dtype == torch.int64
    q_THd = q_THd if q_THd.stride(2) == 1 and q_THd.stride(1) == head_dim else q_THd.contiguous()
    out = empty(num_tokens, heads, head_dim, dtype=q_THd.dtype)
    if num_sequences := sequences_S4.shape[0]:
        cached = (k_NGd.data_ptr(), v_NGd.data_ptr(), out.data_ptr(), blocks.data_ptr(), sequences_S4.data_ptr())
        sizes = (num_sequences, heads, kv_heads, head_dim, block_size, q_THd.stride(0))
        run(path, ATTENTION, q_THd.data_ptr(), *cached, *sizes, float(scale))
    return out
