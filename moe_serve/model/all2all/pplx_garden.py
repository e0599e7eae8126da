"""Perplexity's kernels over RDMA and NVLink, P2PAllToAll of https://github.com/perplexityai/pplx-garden.

A row travels once to each expert and arrives sorted by them; the host waits to hear how many come.

Shape letters: T rows here, K top-k, R received rows, e local physical experts, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from moe_kernels.quantise.quantise import quantise
from pplx_garden.fabric_lib import TransferEngine
from pplx_garden.kernels.p2p_all_to_all import P2PAllToAll
from torch import Tensor

from moe_serve.model.all2all.base import Arrived, ArrivedForm, Sorted
from moe_serve.model.all2all.library import SentRoutes, begin, named
from moe_serve.model.all2all.rows import fill_gaps
from moe_serve.model.all2all.shape import QUANTISED_COLUMNS, DispatchShape, ExpertLayout
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.communicator import ParallelGroup
from moe_serve.parallel.pending import Pending
from moe_serve.parallel.whereabouts import ranks_by_place

NODE_SIZES = (1, 2, 4, 8)
"""Ranks of a machine that its kernels are compiled for."""
log = logging.getLogger(__name__)


class PplxGarden:
    """`dispatch` and `combine` of P2PAllToAll, each sent at once and received by wait().

    combine adds a row's weighted terms in the order of its top k, in float32.
    """

    arrives: ClassVar[ArrivedForm] = Sorted
    applies_weights: ClassVar[Literal["combine", "experts"]] = "combine"
    id_dtype: ClassVar[torch.dtype] = torch.int32
    exact: ClassVar[bool] = True
    padding_rows = 0

    def __init__(self, group: Group, layout: ExpertLayout, shape: DispatchShape) -> None:
        self._num_experts, self._quantises = layout.num_physical, shape.quantisation is not None
        self._num_local = layout.num_local(group.rank)
        self._most_received = shape.max_rows * group.size * min(shape.top_k, self._num_local)
        dtype: torch.dtype = getattr(torch, shape.dtype)
        with named("setting up", "pplx_garden"):
            self._library: Any = P2PAllToAll(
                max_num_tokens=shape.max_rows,
                num_experts=layout.num_physical,
                expert_padding=1,
                hidden_dim=shape.hidden,
                hidden_dim_scale=shape.hidden // QUANTISED_COLUMNS if self._quantises else None,
                in_dtype=torch.float8_e4m3fn if self._quantises else dtype,
                out_dtype=dtype,
                scale_dtype=torch.float32 if self._quantises else None,
                num_experts_per_token=shape.top_k,
                nets_per_gpu=_networks(group),
                max_private_tokens=None,
                device=group.device,
                dp_group=None,  # no two ranks bring the same rows
                node_group=_node_group(group),
                global_group=ParallelGroup(group),
            )

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Arrived]:
        ids_TK, weights_TK = fill_gaps(physical_ids_TK, weights_TK, self._num_experts)
        routes = SentRoutes(ids_TK.view(torch.uint32), weights_TK.contiguous())
        rows_TD, scales = quantise(x_TD) if self._quantises else (x_TD.contiguous(), None)
        counts_e = torch.empty(self._num_local, dtype=torch.int32, device=x_TD.device)
        room = rows_TD.new_empty((self._most_received, rows_TD.shape[1]))
        room_scales = None if scales is None else scales.new_empty((self._most_received, scales.shape[1]))
        call = partial(
            self._library.dispatch, counts_e, room, room_scales, rows_TD, scales, routes.slots_TK, routes.weights_TK
        )
        receive = begin(call, "dispatch", "pplx_garden")

        def arrived() -> Arrived:
            receive()
            num_received = int(counts_e.sum())
            arrived_scales = None if room_scales is None else room_scales[:num_received]
            return Sorted(room[:num_received], counts_e.long(), routes, scales=arrived_scales)

        return Pending(arrived)

    def combine(self, outputs: Tensor, arrived: Arrived) -> Pending[Tensor]:
        routes = arrived.ticket
        assert isinstance(routes, SentRoutes)
        out_TD = outputs.new_empty((routes.slots_TK.shape[0], outputs.shape[1]))
        call = partial(self._library.combine, out_TD, routes.slots_TK, routes.weights_TK, outputs.contiguous())
        receive = begin(call, "combine", "pplx_garden")

        def added_up() -> Tensor:
            receive()
            return out_TD

        return Pending(added_up)

    def close(self) -> None:
        """Once, by all ranks; what the library has started goes on until it is told."""
        if self._library is not None:
            self._library.destroy()
            self._library = None


def _networks(group: Group) -> int:
    """RDMA devices beside a GPU, as many as every rank has."""
    own = [len(each.domains) for each in TransferEngine.detect_topology() if each.cuda_device == group.device.index]
    counts = torch.tensor([max(own, default=0)], device=group.device)
    return int(group.all_reduce_min(counts))


def _node_group(group: Group) -> ParallelGroup | None:
    """Those that reach each other by NVLink; None, where the kernels have no form for how ranks lie on machines."""
    nodes = ranks_by_place(group, "pid")
    size = len(nodes[0])
    if size in NODE_SIZES and nodes == [[*range(first, first + size)] for first in range(0, group.size, size)]:
        return ParallelGroup(group, nodes[group.rank // size]) if size > 1 else None
    if group.rank == 0:
        log.warning(
            "--all2all-backend pplx_garden sends all rows over RDMA, those within a machine too: it wants %s ranks, "
            "one behind the other, on every machine, and there are %s",
            " or ".join(map(str, NODE_SIZES)),
            "; ".join(", ".join(map(str, node)) for node in nodes),
        )
    return None
