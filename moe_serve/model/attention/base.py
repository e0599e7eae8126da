"""The attention interface: rotate, store this step's keys and values in the paged cache, attend. And its table."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_serve.base.registry import Registry
from moe_serve.model.context import ForwardContext, LayerKV
from moe_serve.model.layers.norm import HeadNorm
from moe_serve.model.layers.rope import Rotation

ATTENTION = Registry(
    "attention backend",
    "build_model(attention=)",
    {"sdpa": "moe_serve.model.attention.sdpa:SDPA", "paged": "moe_serve.model.attention.paged:Paged"},
)


Ints = NDArray[Any]


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sequences of a step in the order of their rows; none in a dummy step.

    `sequences_S4` int64, a sequence in each row: its first row in the step, how many rows, the position of the first
    one (earlier ones are cached), and where its table begins in `blocks` (int32), where all tables lie one after the
    other. `positions_T` int64 of all rows.
    """

    sequences_S4: Ints
    positions_T: Ints
    blocks: Ints
    block_size: int

    @classmethod
    def of(
        cls, starts: Sequence[int], counts: Sequence[int], tables: Sequence[Sequence[int]], block_size: int
    ) -> StepShape:
        """A sequence in each place: its first position in this step, how many, and its block table.

        A table covers positions [0, start + count) and may be longer. Of type array("i") it is copied as memory, any
        other number by number. There is a turn of Python for each sequence, none for its tokens or blocks.
        """
        rows, blocks, row = array("q"), array("i"), 0
        for start, count, table in zip(starts, counts, tables, strict=True):
            rows.extend((row, count, start, len(blocks)))
            blocks.extend(table)
            row += count
        sequences_S4: Ints = np.asarray(rows).reshape(-1, 4)
        positions_T = sequences_S4[:, 2].copy()
        if counts.count(1) < len(counts):
            positions_T = np.arange(row) + (positions_T - sequences_S4[:, 0]).repeat(sequences_S4[:, 1])
        return cls(sequences_S4, positions_T, np.asarray(blocks), block_size)

    @property
    def counts_S(self) -> Ints:
        """How many rows each sequence has."""
        return self.sequences_S4[:, 1]

    @property
    def slots_T(self) -> Ints:
        """Where the keys and values of the step's rows go, int64."""
        blocks_T, firsts = self.positions_T // self.block_size, self.sequences_S4[:, 3]
        places_T = blocks_T + (firsts if len(firsts) == len(blocks_T) else firsts.repeat(self.counts_S))
        slots_T: Ints = self.positions_T + (self.blocks[places_T] - blocks_T) * self.block_size
        return slots_T

    def of_rows(self, first: int, stop: int) -> StepShape:
        """Rows [first, stop) of the step as a step of their own, after that of the rows before."""
        firsts_S, counts_S, starts_S, tables_S = self.sequences_S4.T
        begins_S, ends_S = firsts_S.clip(first), (firsts_S + counts_S).clip(max=stop)
        there = begins_S < ends_S
        columns = (begins_S - first, ends_S - begins_S, starts_S + begins_S - firsts_S, tables_S)
        return StepShape(np.stack(columns, axis=1)[there], self.positions_T[first:stop], self.blocks, self.block_size)

    def table(self, sequence: int) -> Ints:
        """The blocks of one sequence that hold its positions up to the last of this step."""
        _, count, start, first = self.sequences_S4[sequence].tolist()
        return self.blocks[first : first - (-(start + count) // self.block_size)]


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
        ctx: ForwardContext,
        norm: HeadNorm | None = None,
    ) -> Tensor:
        """Norm the heads of q and k where there is a norm, rotate them, write k and v to their slots, attend.

        Causally over each sequence's whole past, as plan() has laid it out in `ctx.attention`. Returns (T, H, d).
        """
        ...
