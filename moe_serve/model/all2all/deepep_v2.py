"""DeepEP's second interface, deep_ep.ElasticBuffer of https://github.com/deepseek-ai/DeepEP.

A row travels once to each rank that computes for it and arrives in the order of the ranks; the host waits to hear how
many come.

Shape letters: T rows here, R received rows, K top-k, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import deep_ep
import torch
from moe_kernels.quantise.quantise import quantise
from torch import Tensor

from moe_serve.model.all2all.base import Arrived, ArrivedForm, RankMajor
from moe_serve.model.all2all.library import named
from moe_serve.model.all2all.rows import one_row_at_least
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.communicator import Communicator
from moe_serve.parallel.pending import Pending


class DeepEPV2:
    """`dispatch` and `combine` of deep_ep.ElasticBuffer, as DeepEPHighThroughput.

    Where a rank has no rows it sends one that no expert weighs: the host of a rank that sends nothing would wait for
    counts that never come.
    """

    arrives: ClassVar[ArrivedForm] = RankMajor
    applies_weights: ClassVar[Literal["combine", "experts"]] = "experts"
    id_dtype: ClassVar[torch.dtype] = deep_ep.topk_idx_t
    exact: ClassVar[bool] = False

    def __init__(self, group: Group, layout: ExpertLayout, shape: DispatchShape) -> None:
        self.padding_rows = 0
        self._num_experts, self._quantises = layout.num_physical, shape.quantisation is not None
        with named("setting up", "deepep_v2"):
            told = Communicator(group)
            told.barrier()  # the first collective makes NCCL's communicator, which the library takes over
            self._buffer: Any = deep_ep.ElasticBuffer(
                told,
                num_max_tokens_per_rank=shape.max_rows,
                hidden=shape.hidden,
                num_topk=shape.top_k,
                use_fp8_dispatch=self._quantises,
                explicitly_destroy=True,
            )

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Arrived]:
        num_rows = x_TD.shape[0]
        self.padding_rows += not num_rows
        x_TD, physical_ids_TK, weights_TK = one_row_at_least(x_TD, physical_ids_TK, weights_TK)
        with named("dispatch", "deepep_v2"):
            arrived, ids_RK, weights_RK, handle, _ = self._buffer.dispatch(
                quantise(x_TD) if self._quantises else x_TD,
                topk_idx=physical_ids_TK,
                topk_weights=weights_TK,
                num_experts=self._num_experts,
            )
        rows, scales = arrived if self._quantises else (arrived, None)
        return Pending(lambda: RankMajor(rows, ids_RK, weights_RK, (handle, num_rows), scales))

    def combine(self, outputs: Tensor, arrived: Arrived) -> Pending[Tensor]:
        handle, num_rows = cast(tuple[Any, int], arrived.ticket)
        with named("combine", "deepep_v2"):
            out_TD, _, _ = self._buffer.combine(outputs, handle)
        return Pending(lambda: out_TD[:num_rows])

    def close(self) -> None:
        """Once; the library's own destructor may hang while an error is on its way up."""
        if self._buffer is not None:
            self._buffer.destroy()
            self._buffer = None
