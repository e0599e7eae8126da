"""A step in two halves that take turns: while the rows of one travel, the other computes (dual batch overlap).

All ranks cut the same steps, so all exchange in the same order: the first half's dispatch, the second's, the first's
combine, the second's, in every layer. After the two micro-batches of DeepSeek-V3's technical report (2024).

Shape letters: T tokens of this rank, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_serve.base.topology import split_range
from moe_serve.model.all2all.shape import NUM_HALVES
from moe_serve.model.context import ForwardContext
from moe_serve.model.decoder import Decoder
from moe_serve.model.layers.rope import Rotation
from moe_serve.model.turns import take_turns


def half_of(num_tokens: int, half: int) -> slice:
    """Which of so many tokens are in a half."""
    part = split_range(num_tokens, NUM_HALVES, half)
    return slice(part.start, part.stop)


@torch.inference_mode()
def forward_in_halves(
    decoder: Decoder,
    token_ids_T: Tensor,
    ctx: ForwardContext,
    halves: Sequence[ForwardContext],
    hidden_TD: Tensor | None = None,
) -> Tensor:
    """As decoder(token_ids_T, ctx, hidden_TD), its layers by `halves`, whose tokens are those of half_of()."""
    x_TD, rotation = decoder.enter(token_ids_T, ctx, hidden_TD)
    parts = [half_of(len(token_ids_T), half) for half in range(NUM_HALVES)]
    made = take_turns(
        [
            decoder.in_turns(x_TD[part], Rotation(rotation.cos[part], rotation.sin[part]), half)
            for part, half in zip(parts, halves, strict=True)
        ]
    )
    if ctx.routes is not None:
        first, second = (half.routes or [] for half in halves)
        ctx.routes.extend(torch.cat(both) for both in zip(first, second, strict=True))
    return torch.cat(made)
