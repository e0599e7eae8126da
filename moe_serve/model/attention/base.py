"""The attention interface: rotate, store this step's keys and values in the paged cache, attend. And its table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_serve.base.registry import Registry
from moe_serve.model.context import LayerKV
from moe_serve.model.layers.norm import HeadNorm
from moe_serve.model.layers.rope import Rotation

ATTENTION = Registry(
    "attention backend",
    "build_model(attention=)",
    {"sdpa": "moe_serve.model.attention.sdpa:SDPA", "paged": "moe_serve.model.attention.paged:Paged"},
)


@dataclass(frozen=True, slots=True)
class SequenceShape:
    """One sequence's part in a step: rows [start, start + num_tokens) of it are computed; earlier ones are cached.

    `block_ids` covers positions [0, start + num_tokens).
    """

    start: int
    num_tokens: int
    block_ids: list[int]


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sequences of a step in the order of their rows; empty for a dummy step."""

    sequences: list[SequenceShape]
    block_size: int


class AttentionBackend(Protocol):
    """Made once per worker, with this rank's head counts; `path` of moe_kernels, for those that are compiled."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device, path: str | None = None
    ) -> None: ...

    def plan(self, step: StepShape) -> object:
        """Once per step, on the host: index tensors that every layer uses."""
        ...

    def forward(
        self,
        q_THd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        rotation: Rotation,
        kv: LayerKV,
        plan: object,
        norm: HeadNorm | None = None,
    ) -> Tensor:
        """Norm the heads of q and k where there is a norm, rotate them, write k and v to their slots, attend.

        Causally over each sequence's whole past. Returns (T, H, d).
        """
        ...


def slots_of(sequence: SequenceShape, block_size: int) -> list[int]:
    """Where the keys and values of its new tokens go."""
    return [
        sequence.block_ids[position // block_size] * block_size + position % block_size
        for position in range(sequence.start, sequence.start + sequence.num_tokens)
    ]
