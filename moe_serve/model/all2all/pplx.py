"""Perplexity's kernels within a machine, pplx_kernels.AllToAll of https://github.com/perplexityai/pplx-kernels.

A row travels once to each expert, into memory that has room for the worst case; the host waits for nothing.

Shape letters: T rows here, K top-k, e local physical experts, C room of an expert, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import pplx_kernels
import torch
from moe_kernels.quantise.quantise import quantise
from torch import Tensor

from moe_serve.model.all2all.base import Arrived, ArrivedForm, Batched
from moe_serve.model.all2all.library import SentRoutes, begin, named
from moe_serve.model.all2all.rows import fill_gaps
from moe_serve.model.all2all.shape import QUANTISED_COLUMNS, DispatchShape, ExpertLayout
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.communicator import registered
from moe_serve.parallel.pending import Pending
from moe_serve.parallel.whereabouts import refuse_apart


class Pplx:
    """`dispatch` and `combine` of AllToAll.intranode, each sent at once and received by wait().

    combine adds a row's weighted terms in the order of its top k, in float32.
    """

    arrives: ClassVar[ArrivedForm] = Batched
    applies_weights: ClassVar[Literal["combine", "experts"]] = "combine"
    id_dtype: ClassVar[torch.dtype] = torch.int32
    exact: ClassVar[bool] = True
    padding_rows = 0

    def __init__(self, group: Group, layout: ExpertLayout, shape: DispatchShape) -> None:
        refuse_apart(group, "--all2all-backend pplx stays within a machine", ("pid", "ipc"), "processes or IPC")
        self._num_experts, self._quantises = layout.num_physical, shape.quantisation is not None
        self._room = (layout.num_local(group.rank), shape.max_rows * group.size)
        num_scales = shape.hidden // QUANTISED_COLUMNS if self._quantises else 0
        row_bytes = shape.hidden * (1 if self._quantises else getattr(torch, shape.dtype).itemsize)
        with named("setting up", "pplx"), registered(group) as name:
            self._library: Any = pplx_kernels.AllToAll.intranode(
                max_num_tokens=shape.max_rows,
                num_experts=layout.num_physical,
                experts_per_token=shape.top_k,
                rank=group.rank,
                world_size=group.size,
                dp_size=1,  # no two ranks bring the same rows
                hidden_dim=shape.hidden,
                hidden_dim_bytes=row_bytes,
                hidden_dim_scale_bytes=num_scales * torch.float32.itemsize,
                group_name=name,
            )

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Arrived]:
        ids_TK, weights_TK = fill_gaps(physical_ids_TK, weights_TK, self._num_experts)
        routes = SentRoutes(ids_TK.view(torch.uint32), weights_TK.contiguous())
        rows_TD, scales = quantise(x_TD) if self._quantises else (x_TD.contiguous(), None)
        counts_e = torch.empty(self._room[0], dtype=torch.int32, device=x_TD.device)
        room = rows_TD.new_empty((*self._room, rows_TD.shape[1]))
        room_scales = None if scales is None else scales.new_empty((*self._room, scales.shape[1]))
        call = partial(self._library.dispatch, counts_e, room, room_scales, rows_TD, scales, routes.slots_TK, None)
        receive = begin(call, "dispatch", "pplx")

        def arrived() -> Arrived:
            receive()
            return Batched(room, counts_e, routes, scales=room_scales)

        return Pending(arrived)

    def combine(self, outputs: Tensor, arrived: Arrived) -> Pending[Tensor]:
        routes = arrived.ticket
        assert isinstance(routes, SentRoutes)
        out_TD = outputs.new_empty((routes.slots_TK.shape[0], outputs.shape[2]))
        call = partial(self._library.combine, out_TD, routes.slots_TK, routes.weights_TK, outputs.contiguous(), None)
        receive = begin(call, "combine", "pplx")

        def added_up() -> Tensor:
            receive()
            return out_TD

        return Pending(added_up)

    def close(self) -> None:
        """Safe to call twice, as the library's own."""
        self._library.destroy()
