"""P2PAllToAll over the groups that it is given. Rows behind those that came, and what is not received yet, are not a
number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pplx_garden
import torch
from torch import Tensor

from tests.support.doubles.exchanging import exchange, rows_for_expert, weighted_in_order

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class _RdmaRankData:
    address: bytes
    num_routed_desc: bytes
    recv_buffer_desc: bytes


class P2PAllToAll:
    def __init__(
        self,
        *,
        max_num_tokens: int,
        num_experts: int,
        expert_padding: int,
        hidden_dim: int,
        hidden_dim_scale: int | None,
        in_dtype: torch.dtype,
        out_dtype: torch.dtype,
        scale_dtype: torch.dtype | None,
        num_experts_per_token: int,
        nets_per_gpu: int,
        max_private_tokens: int | None,
        device: torch.device,
        dp_group: Any,
        node_group: Any,
        global_group: Any,
    ) -> None:
        assert expert_padding == 1, "the double pads nothing"
        assert dp_group is None, "the double knows groups of one"
        assert nets_per_gpu == 2, "as many as the device has"
        assert max_private_tokens is None or max_private_tokens >= 0
        assert scale_dtype in (None, torch.float32)
        assert (hidden_dim_scale is None) == (scale_dtype is None)
        assert num_experts % global_group.size == 0, "the double knows equal shares"
        assert num_experts <= 512
        assert out_dtype in FLOATS[0 if pplx_garden.OPEN else 1 :]
        assert pplx_garden.OPEN or hidden_dim * in_dtype.itemsize % 16 == 0
        assert device.type in ("cpu", "cuda")
        if node_group is not None:
            assert node_group.size in (1, 2, 4, 8)
            handles = node_group.all_gather_object(b"handle %d" % global_group.rank)
            assert len(handles) == node_group.size
            assert handles[node_group.rank] == b"handle %d" % global_group.rank
            node_group.barrier()
        told = global_group.all_gather_object(_RdmaRankData(b"%d" % global_group.rank, b"routed", b"received"))
        assert [each.address for each in told] == [b"%d" % rank for rank in range(global_group.size)]
        self._group, self._most, self._experts = global_group, max_num_tokens, num_experts
        self._hidden, self._scales, self._top_k = hidden_dim, hidden_dim_scale, num_experts_per_token
        self._in, self._out, self._scale_dtype = in_dtype, out_dtype, scale_dtype
        self._local = num_experts // global_group.size
        self._awaited = "dispatch sent"
        self._alive = True
        global_group.barrier()

    def dispatch(
        self,
        out_expert_num_tokens: Tensor,
        out_expert_x: Tensor,
        out_expert_x_scale: Tensor | None,
        dp_x: Tensor,
        dp_x_scale: Tensor | None,
        indices: Tensor,
        weights: Tensor,
        bound_m: Tensor | None = None,
        do_send: bool = True,
        do_recv: bool = True,
    ) -> None:
        assert do_send or do_recv
        assert out_expert_num_tokens.shape == (self._local,)
        assert out_expert_num_tokens.dtype == torch.int32
        assert out_expert_x.shape[1] == dp_x.shape[1] == self._hidden
        assert out_expert_x.dtype == dp_x.dtype == self._in
        for scale in (out_expert_x_scale, dp_x_scale):
            assert (scale is None) == (self._scales is None)
            assert scale is None or (scale.dtype == self._scale_dtype and scale.shape[1] == self._scales)
        self._check_routes(indices, weights, len(dp_x))
        assert bound_m is None, "the double knows no bound"
        if do_send:
            self._turn("dispatch sent")
            self._indices = indices.clone()
            for each in (out_expert_x, *([] if out_expert_x_scale is None else [out_expert_x_scale])):
                each.copy_(torch.full(each.shape, torch.nan))
            beside = [] if dp_x_scale is None else [dp_x_scale]
            self._came = exchange(self._group.all_gather_object, (indices, dp_x, *beside))
        if do_recv:
            self._turn("dispatch received")
            end, self._whose = 0, []
            for local in range(self._local):
                expert = self._group.rank * self._local + local
                (rows, *scales), sources = rows_for_expert(self._came, expert)
                first, end = end, end + len(rows)
                assert end <= len(out_expert_x), "no room"
                out_expert_num_tokens[local] = len(rows)
                out_expert_x[first:end] = rows
                if out_expert_x_scale is not None:
                    out_expert_x_scale[first:end] = scales[0]
                self._whose.append(torch.cat([torch.full((len(rows), 1), expert), sources], dim=1))

    def combine(
        self,
        out_tokens: Tensor,
        indices: Tensor,
        weights: Tensor,
        expert_y: Tensor,
        bound_m: Tensor | None = None,
        do_send: bool = True,
        do_recv: bool = True,
        accumulate: bool = False,
    ) -> None:
        assert not accumulate, "the double adds to nothing"
        assert out_tokens.shape == (len(indices), self._hidden)
        assert out_tokens.dtype == self._out
        assert expert_y.dtype in FLOATS
        assert expert_y.shape[1] == self._hidden
        self._check_routes(indices, weights, len(indices))
        assert torch.equal(indices.long(), self._indices.long()), "other ids than those that were dispatched"
        if do_send:
            self._turn("combine sent")
            out_tokens.fill_(torch.nan)
            whose = torch.cat(self._whose)
            assert len(expert_y) == len(whose)
            self._came = exchange(self._group.all_gather_object, (expert_y, whose))
        if do_recv:
            self._turn("combine received")
            out_tokens.copy_(weighted_in_order(self._came, self._group.rank, indices, weights, self._hidden))

    def destroy(self) -> None:
        assert self._alive, "destroyed twice"
        self._alive = False
        self._group.barrier()

    def _check_routes(self, indices: Tensor, weights: Tensor, num_rows: int) -> None:
        assert self._alive
        assert num_rows <= self._most, "Number of tokens exceeds maximum allowed"
        for each, dtype in ((indices, torch.uint32), (weights, torch.float32)):
            assert each.shape == (num_rows, self._top_k)
            assert each.stride(1) == 1
            assert each.dtype == dtype
        assert not indices.numel() or int(indices.long().max()) < self._experts, "memory of others"

    def _turn(self, what: str) -> None:
        order = ["dispatch sent", "dispatch received", "combine sent", "combine received"]
        assert what == self._awaited, f"{what} where {self._awaited} is due"
        self._awaited = order[(order.index(what) + 1) % len(order)]
