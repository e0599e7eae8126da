"""A double of pplx_kernels 0.0.1's AllToAll within a machine (commit 2bd6e30): its documented semantics and refusals.

Everything goes through the torch process group that it is given by name, as the library's own set-up does. Places
without a row, and whatever is not received yet, are not a number. With OPEN sizes and types are free, and one rank will
do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from tests.support.doubles.exchanging import exchange, rows_for_expert, weighted_in_order

OPEN = False
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class AllToAll:
    def __init__(self, ptr: Any, combine_fn: Callable[..., None], dispatch_fn: Callable[..., None], has_scales: bool):
        self._ptr, self._combine_fn, self._dispatch_fn, self._has_scales = ptr, combine_fn, dispatch_fn, has_scales

    def dispatch(
        self,
        out_expert_num_tokens: Tensor,
        out_expert_x: Tensor,
        out_expert_x_scale: Tensor | None,
        dp_x: Tensor,
        dp_x_scale: Tensor | None,
        indices: Tensor,
        bound_m: Tensor | None,
        do_send: bool = True,
        do_recv: bool = True,
    ) -> None:
        assert self._ptr is not None
        for scale in (out_expert_x_scale, dp_x_scale):
            assert (scale is not None) == self._has_scales
        self._dispatch_fn(
            out_expert_num_tokens,
            out_expert_x,
            out_expert_x_scale,
            dp_x,
            dp_x_scale,
            indices,
            bound_m,
            do_send,
            do_recv,
        )

    def combine(
        self,
        out_tokens: Tensor,
        indices: Tensor,
        weights: Tensor,
        expert_y: Tensor,
        bound_m: Tensor | None,
        do_send: bool = True,
        do_recv: bool = True,
    ) -> None:
        assert self._ptr is not None
        self._combine_fn(out_tokens, indices, weights, expert_y, bound_m, do_send, do_recv)

    def destroy(self) -> None:
        self._ptr = None

    @classmethod
    def intranode(
        cls,
        max_num_tokens: int,
        num_experts: int,
        experts_per_token: int,
        rank: int,
        world_size: int,
        dp_size: int,
        hidden_dim: int,
        hidden_dim_bytes: int,
        hidden_dim_scale_bytes: int,
        group_name: str = "default",
    ) -> AllToAll:
        assert world_size % dp_size == 0
        assert OPEN or world_size // dp_size > 1
        assert dp_size == 1, "the double knows groups of one"
        assert OPEN or hidden_dim_bytes % 16 == 0, "invalid hidden dim bytes"
        assert OPEN or hidden_dim_scale_bytes % 16 == 0, "invalid hidden dim scale bytes"
        assert hidden_dim_scale_bytes <= hidden_dim_bytes
        assert num_experts % world_size == 0, "the double knows equal shares"
        group = _resolve_process_group(group_name)  # type: ignore[arg-type]
        assert (group.rank(), group.size()) == (rank, world_size)
        native = _Native(
            group, max_num_tokens, num_experts, experts_per_token, hidden_dim, hidden_dim_bytes, hidden_dim_scale_bytes
        )
        return cls(native, native.combine, native.dispatch, hidden_dim_scale_bytes > 0)


class _Native:
    """What is behind the pointer."""

    def __init__(
        self, group: Any, most: int, experts: int, top_k: int, hidden: int, row_bytes: int, scale_bytes: int
    ) -> None:
        self._group, self._most, self._top_k = group, most, top_k
        self._hidden, self._row_bytes, self._scale_bytes = hidden, row_bytes, scale_bytes
        self._rank, self._local = group.rank(), experts // group.size()
        self._experts = experts
        self._awaited = "dispatch sent"
        self._given: list[tuple[Tensor, Tensor]] = []

    def dispatch(
        self,
        counts: Tensor,
        room: Tensor,
        room_scale: Tensor | None,
        x: Tensor,
        scale: Tensor | None,
        indices: Tensor,
        bound: Tensor | None,
        do_send: bool,
        do_recv: bool,
    ) -> None:
        for dimensions, each in ((1, counts), (3, room), (2, x), (2, indices)):
            assert each.is_contiguous()
            assert each.dim() == dimensions
        self._check_routes(indices, len(x))
        assert counts.dtype == torch.int32
        assert counts.shape == (self._local,)
        assert x.shape[1] * x.element_size() == self._row_bytes
        assert room.shape == (self._local, self._most * self._group.size(), x.shape[1])
        assert room.dtype == x.dtype
        beside = [] if scale is None else [scale]
        if scale is not None:
            assert room_scale is not None
            assert scale.dtype == torch.float32
            assert scale.shape[1] * 4 == self._scale_bytes
            assert room_scale.shape == (*room.shape[:2], scale.shape[1])
        assert bound is None, "the double knows no bound"
        if do_send:
            self._turn("dispatch sent")
            self._indices = indices.clone()
            for each in (room, *([] if room_scale is None else [room_scale])):
                each.copy_(torch.full(each.shape, torch.nan))
            self._came = exchange(self._allgather, (indices, x, *beside))
        if do_recv:
            self._turn("dispatch received")
            self._sources = []
            for expert in range(self._local):
                (rows, *scales), sources = rows_for_expert(self._came, self._rank * self._local + expert)
                counts[expert] = len(rows)
                room[expert, : len(rows)] = rows
                if room_scale is not None:
                    room_scale[expert, : len(rows)] = scales[0]
                self._sources.append(sources)

    def combine(
        self,
        out: Tensor,
        indices: Tensor,
        weights: Tensor,
        outputs: Tensor,
        bound: Tensor | None,
        do_send: bool,
        do_recv: bool,
    ) -> None:
        for dimensions, each in ((2, out), (2, indices), (2, weights), (3, outputs)):
            assert each.is_contiguous()
            assert each.dim() == dimensions
        self._check_routes(indices, len(out))
        assert torch.equal(indices.long(), self._indices.long()), "other ids than those that were dispatched"
        assert weights.dtype == torch.float32
        assert weights.shape == indices.shape
        assert outputs.dtype in FLOATS
        assert out.dtype in FLOATS[0 if OPEN else 1 :]
        assert outputs.shape == (self._local, self._most * self._group.size(), self._hidden)
        assert out.shape[1] == self._hidden
        assert bound is None
        if do_send:
            self._turn("combine sent")
            out.fill_(torch.nan)
            rows = torch.cat([outputs[expert, : len(whose)] for expert, whose in enumerate(self._sources)])
            experts = [torch.full((len(whose), 1), expert) for expert, whose in enumerate(self._sources)]
            whose = torch.cat([torch.cat(experts) + self._rank * self._local, torch.cat(self._sources)], dim=1)
            self._came = exchange(self._allgather, (rows, whose))
        if do_recv:
            self._turn("combine received")
            out.copy_(weighted_in_order(self._came, self._rank, indices, weights, self._hidden))

    def _check_routes(self, indices: Tensor, num_rows: int) -> None:
        assert indices.dtype == torch.uint32, "indices must be of type UInt32"
        assert indices.shape == (num_rows, self._top_k)
        assert num_rows <= self._most
        assert not indices.numel() or int(indices.long().max()) < self._experts, "memory of others"

    def _turn(self, what: str) -> None:
        order = ["dispatch sent", "dispatch received", "combine sent", "combine received"]
        assert what == self._awaited, f"{what} where {self._awaited} is due"
        self._awaited = order[(order.index(what) + 1) % len(order)]

    def _allgather(self, told: Any) -> list[Any]:
        packed = torch.frombuffer(bytearray(msgspec.msgpack.encode(told)), dtype=torch.uint8)
        sizes = self._all(torch.tensor([packed.numel()]).view(torch.uint8)).view(torch.int64)[:, 0].tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: packed.numel()] = packed
        everybody = self._all(padded)
        return [
            msgspec.msgpack.decode(row[:size].numpy().tobytes()) for row, size in zip(everybody, sizes, strict=True)
        ]

    def _all(self, row: Tensor) -> Tensor:
        size = self._group.size()
        out = torch.empty((size, row.numel()), dtype=torch.uint8)
        self._group.alltoall_base(out, row.repeat(size, 1), [1] * size, [1] * size).wait()
        return out
