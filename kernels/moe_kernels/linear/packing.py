"""The order in which the compiled products want their weights: panels of 16 output columns, pairs of inputs together.

(N, K) row by row becomes (N / 16, K / 2, 16, 2), as many bytes: one stream of memory for a product, whose vectors are
16 columns wide, and whose pairs are what instructions for bfloat16 take.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 16


def can_pack(num_rows: int, num_columns: int) -> bool:
    """Whether a bfloat16 weight (N, K) has the shape for it."""
    return num_rows > 0 and num_columns > 0 and num_rows % PANEL == 0 and num_columns % PANEL == 0


def pack(weight: Tensor) -> None:
    """Put a contiguous (N, K) bfloat16 weight into the packed order, in its own memory."""
    pairs = weight.view(torch.int32)
    weight.view(-1).copy_(_panels(pairs).reshape(-1).view(weight.dtype))


def pack_gated(gate_up: Tensor) -> None:
    """The same for (2F, K), gate above up: panels of gate and up in turns, so that one stream brings both."""
    both = gate_up.view(torch.int32).view(2, -1, gate_up.shape[1] // 2)
    in_turns = torch.stack([_panels(half) for half in both], dim=1)
    gate_up.view(-1).copy_(in_turns.reshape(-1).view(gate_up.dtype))


def unpack(packed: Tensor) -> Tensor:
    """A weight (N, K) as pack() found it."""
    num_rows, num_columns = packed.shape
    panels = packed.view(-1).view(torch.int32).view(num_rows // PANEL, num_columns // 2, PANEL)
    return panels.transpose(1, 2).contiguous().view(packed.dtype).view(num_rows, num_columns)


def unpack_rows(packed: Tensor, rows_T: Tensor) -> Tensor:
    """(T, K): some rows of a weight (N, K) as pack() found it, each of which lies in pieces."""
    num_rows, num_columns = packed.shape
    panels = packed.view(-1).view(torch.int32).view(num_rows // PANEL, num_columns // 2, PANEL)
    return panels[rows_T // PANEL, :, rows_T % PANEL].view(packed.dtype)


def _panels(pairs: Tensor) -> Tensor:
    """(N, K / 2) -> (N / 16, K / 2, 16)."""
    return pairs.view(-1, PANEL, pairs.shape[1]).transpose(1, 2).contiguous()
