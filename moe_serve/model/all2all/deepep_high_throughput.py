"""DeepEP's kernels for many rows, deep_ep.Buffer of https://github.com/deepseek-ai/DeepEP.

A row travels once to each rank that computes for it and arrives in the order of the ranks; the host waits to hear how
many come.

Shape letters: T rows here, N ranks, R received rows, K top-k, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import deep_ep
import torch
from moe_kernels.quantise.quantise import quantise
from torch import Tensor

from moe_serve.model.all2all.base import Arrived, ArrivedForm, RankMajor
from moe_serve.model.all2all.library import named
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.communicator import MutableCommunicator
from moe_serve.parallel.pending import Pending


class DeepEPHighThroughput:
    """`dispatch` and `combine` of deep_ep.Buffer. The experts apply the weights; combine adds up the ranks' sums."""

    arrives: ClassVar[ArrivedForm] = RankMajor
    applies_weights: ClassVar[Literal["combine", "experts"]] = "experts"
    id_dtype: ClassVar[torch.dtype] = deep_ep.topk_idx_t
    exact: ClassVar[bool] = False
    padding_rows = 0

    def __init__(self, group: Group, layout: ExpertLayout, shape: DispatchShape) -> None:
        self._num_experts, self._quantises = layout.num_physical, shape.quantisation is not None
        with named("setting up", "deepep_high_throughput"):
            row_bytes = shape.hidden * max(2, getattr(torch, shape.dtype).itemsize)
            size = group.size
            configs = (deep_ep.Buffer.get_dispatch_config(size), deep_ep.Buffer.get_combine_config(size))
            self._buffer: Any = deep_ep.Buffer(
                None,
                max(config.get_nvl_buffer_size_hint(row_bytes, size) for config in configs),
                max(config.get_rdma_buffer_size_hint(row_bytes, size) for config in configs),
                explicitly_destroy=True,
                comm=MutableCommunicator(group),
            )

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Arrived]:
        with named("dispatch", "deepep_high_throughput"):
            by_rank, by_node, by_expert, goes_TN, _ = self._buffer.get_dispatch_layout(
                physical_ids_TK, self._num_experts
            )
            arrived, ids_RK, weights_RK, _, handle, _ = self._buffer.dispatch(
                quantise(x_TD) if self._quantises else x_TD,
                num_tokens_per_rank=by_rank,
                num_tokens_per_rdma_rank=by_node,
                is_token_in_rank=goes_TN,
                num_tokens_per_expert=by_expert,
                topk_idx=physical_ids_TK,
                topk_weights=weights_TK,
            )
        rows, scales = arrived if self._quantises else (arrived, None)
        return Pending(lambda: RankMajor(rows, ids_RK, weights_RK, handle, scales))

    def combine(self, outputs: Tensor, arrived: Arrived) -> Pending[Tensor]:
        with named("combine", "deepep_high_throughput"):
            out_TD, _, _ = self._buffer.combine(outputs, arrived.ticket)
        return Pending(lambda: out_TD)

    def close(self) -> None:
        """Once; the library's own destructor may hang while an error is on its way up."""
        if self._buffer is not None:
            self._buffer.destroy()
            self._buffer = None
