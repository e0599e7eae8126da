"""What an all-to-all backend must be able to carry: known before a process is started. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from moe_serve.base.model_config import ModelConfig
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.model.partition import Partition

NUM_HALVES = 2
"""Of a step, where they take turns."""
QUANTISED_COLUMNS = 128
"""A scale for so many of a row: moe_kernels.quantise."""


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Which rank of the group computes which physical expert.

    `offsets` (one per rank plus one): rank r owns slots [offsets[r], offsets[r + 1]). None: every rank holds a slice
    of the width of every expert, so each row goes to all ranks and their partial results are summed.
    """

    num_physical: int
    offsets: tuple[int, ...] | None

    def first_slot(self, rank: int) -> int:
        """The lowest slot that a rank computes."""
        return 0 if self.offsets is None else self.offsets[rank]

    def num_local(self, rank: int) -> int:
        if self.offsets is None:
            return self.num_physical
        return self.offsets[rank + 1] - self.offsets[rank]


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchShape:
    """The largest exchange there can be; a backend may size its buffers by it once.

    `max_rows` that one rank brings to a layer. `dtype` of the rows as config.json names types; `quantisation` of them
    on the wire (None: none). `in_flight` exchanges that may be under way at a time. `graph`: the exchange is captured
    in a CUDA graph. `device` is auto where it is not known yet. `path` of moe_kernels for what is computed on the way,
    torch's own operations if None.
    """

    max_rows: int
    num_ranks: int
    hidden: int
    top_k: int
    dtype: str
    quantisation: str | None = None
    in_flight: int = 1
    graph: bool = False
    device: str = "auto"
    path: str | None = None


def expert_layout(partition: Partition) -> ExpertLayout:
    """Who computes which expert: by the placement, or everybody a slice of all."""
    placement = partition.placement
    if placement is None:
        return ExpertLayout(partition.config.num_experts, None)
    return ExpertLayout(placement.num_physical, placement.offsets)


def dispatch_shape(
    model: ModelConfig, parallel: ParallelConfig, *, max_tokens: int, dtype: str, device: str
) -> DispatchShape:
    """Of engines whose steps have at most `max_tokens` tokens, cut over their tensor ranks."""
    wire = parallel.all2all_dtype
    return DispatchShape(
        max_rows=-(-max_tokens // parallel.topology.tp),
        num_ranks=parallel.topology.ep,
        hidden=model.hidden_size,
        top_k=model.top_k,
        dtype=dtype,
        quantisation=None if wire == "auto" else wire,
        in_flight=NUM_HALVES if parallel.enable_dbo else 1,
        device=device,
    )
