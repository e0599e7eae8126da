"""FlashInfer's kernels over NVLink, flashinfer.moe_ep of https://github.com/flashinfer-ai/flashinfer.

A row travels once to each rank that computes for it; each rank has room for the rows of the rank that brings most.

Shape letters: T rows here, K top-k, R places for received rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from flashinfer import moe_ep
from flashinfer.fused_moe import QuantFormat
from moe_kernels.quantise.quantise import quantise
from torch import Tensor

from moe_serve.model.all2all.base import Arrived, ArrivedForm, RankMajor
from moe_serve.model.all2all.library import named
from moe_serve.model.all2all.rows import fill_gaps, one_row_at_least
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.communicator import Communicator
from moe_serve.parallel.pending import Pending


class NVLink:
    """A communication of flashinfer.moe_ep. The experts apply the weights; combine adds up the ranks' sums.

    One exchange at a time: what arrives lies in the library's memory until combine.
    """

    arrives: ClassVar[ArrivedForm] = RankMajor
    applies_weights: ClassVar[Literal["combine", "experts"]] = "experts"
    id_dtype: ClassVar[torch.dtype] = torch.int32
    exact: ClassVar[bool] = False
    name: ClassVar[str]
    config: ClassVar[type[Any]]

    def __init__(self, group: Group, layout: ExpertLayout, shape: DispatchShape) -> None:
        self.padding_rows = 0
        self._quantises = shape.quantisation is not None
        self._first_slot, self._num_local = layout.first_slot(group.rank), layout.num_local(group.rank)
        self._num_experts = layout.num_physical
        bootstrap = moe_ep.BootstrapConfig(
            world_size=group.size, rank=group.rank, auto_bootstrap=False, device=group.device.index
        )
        params = moe_ep.MoEEpCommParams(
            num_experts=layout.num_physical,
            top_k=shape.top_k,
            max_tokens_per_rank=shape.max_rows,
            hidden_size=shape.hidden,
            dtype=getattr(torch, shape.dtype),
            dispatch_format=QuantFormat.DeepSeekFp8 if self._quantises else None,
        )
        with named("setting up", self.name):
            config = self.config(comm_backend=Communicator(group))
            self._library: Any = moe_ep.create_communication(bootstrap, params, config)

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Arrived]:
        num_rows = x_TD.shape[0]
        self.padding_rows += not num_rows
        ids_TK, weights_TK = fill_gaps(physical_ids_TK, weights_TK, self._num_experts)
        x_TD, ids_TK, weights_TK = one_row_at_least(x_TD, ids_TK, weights_TK)
        rows_TD, scales = quantise(x_TD) if self._quantises else (x_TD.contiguous(), None)
        with named("dispatch", self.name):
            came = self._library.dispatch(
                rows_TD,
                ids_TK.contiguous(),
                weights_TK.contiguous(),
                hidden_states_scale=scales,
                max_tokens_per_rank=max(1, *rows_by_rank),
            )
        local_RK = came.topk_ids.long() - self._first_slot
        local_RK = local_RK.masked_fill((local_RK < 0) | (local_RK >= self._num_local), -1)
        arrived = RankMajor(came.hidden_states, local_RK, came.topk_weights, num_rows, came.hidden_states_scale)
        return Pending(lambda: arrived)

    def combine(self, outputs: Tensor, arrived: Arrived) -> Pending[Tensor]:
        num_rows = arrived.ticket
        assert isinstance(num_rows, int)
        with named("combine", self.name):
            out_TD = self._library.combine(outputs.contiguous())
        return Pending(lambda: out_TD[:num_rows])

    def close(self) -> None:
        """Safe to call twice, as the library's own; it keeps its memory for the next of the same sizes."""
        self._library.destroy()
