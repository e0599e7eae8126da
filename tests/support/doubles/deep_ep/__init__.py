"""A double of deep_ep 2.1.0's Buffer (commit dd758ca): its documented semantics and refusals, over a communicator.

Everything is exchanged by `comm.allgather`, so it runs on CPUs. What the library leaves undefined is not a number here:
places of a buffer without a row, results before their hook was called, results that a later kernel has written over.
With OPEN sizes and types are free; else they are the library's own, and refused as it refuses them.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support.doubles.exchanging import exchange, rows_at

OPEN = False
topk_idx_t = torch.int64
HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
MOST_TOP_K = 11
MOST_ROWS = 1024
SCALED = 128
LARGEST_FP8 = 448.0


class EventOverlap:
    def current_stream_wait(self) -> None:
        pass


class Config:
    """Sizes as the library makes them up, without its exact figures."""

    def __init__(
        self, num_sms: int, nvl_send: int = 6, nvl_recv: int = 256, rdma_send: int = 6, rdma_recv: int = 128
    ) -> None:
        assert num_sms >= 0
        assert nvl_send < nvl_recv
        assert rdma_send <= rdma_recv // 2
        self.num_sms, self._nvl, self._rdma = num_sms, nvl_recv, rdma_recv

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        assert num_ranks < 8 or num_ranks % 8 == 0
        return _aligned(self.num_sms // 2 * min(num_ranks, 8) * self._nvl * (hidden_bytes + 1024))

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return (
            0 if num_ranks <= 8 else _aligned(self.num_sms // 2 * num_ranks // 8 * self._rdma * (hidden_bytes + 1024))
        )


class Buffer:
    num_sms: int = 20

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        assert group is None, "the double knows communicators only"
        if comm is None:
            raise ValueError("Either 'group' or 'comm' must be provided.")
        self.rank, self.group_size, self._comm = comm.Get_rank(), comm.Get_size(), comm
        assert self.group_size < 8 or self.group_size % 8 == 0
        assert num_nvl_bytes % 128 == num_rdma_bytes % 128 == 0
        assert num_rdma_bytes // 16 < 2**31
        self.low_latency_mode, self.explicitly_destroy = low_latency_mode, explicitly_destroy
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self._num_qps = num_qps_per_rank
        handles = comm.allgather([self.rank, b"handle"])
        assert handles == [[rank, bytearray(b"handle")] for rank in range(self.group_size)]
        if low_latency_mode:
            self.nvshmem_qp_depth = int(os.environ.get("NVSHMEM_QP_DEPTH", "1024"))
        self._held: deque[Tensor] = deque()
        self._alive = True

    def destroy(self) -> None:
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"
        assert self._alive, "destroyed twice"
        self._alive = False

    # -- low latency --

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        assert num_experts % num_ranks == 0
        most, count = num_max_dispatch_tokens_per_rank, num_experts
        out = 16 + max(2 * hidden, hidden + 4 * (hidden // SCALED))
        home = hidden // SCALED * 4 + 2 * hidden
        send, receive = max(most * out, count * most * home), count * most * max(out, home)
        return 2 * (send + receive) + 2 * _aligned(4 * count)

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, Tensor, tuple[Any, ...], EventOverlap, Callable[[], None] | None]:
        most, size, (num_rows, hidden) = num_max_dispatch_tokens_per_rank, self.group_size, x.shape
        self._check_low_latency(x, topk_idx, most, num_experts)
        assert not (async_finish and return_recv_hook)
        assert not use_ue8m0 or round_scale, "ue8m0 needs rounded scales"
        assert not use_fp8 or OPEN or hidden % 512 == 0
        assert num_rows <= most
        assert self.num_rdma_bytes >= self.get_low_latency_rdma_size_hint(most, hidden, size, num_experts)
        local = num_experts // size
        came = self._exchange(x, topk_idx)
        info = torch.full((local, most * size), -1, dtype=torch.int32)
        ranges, counts = torch.zeros((local, size), dtype=torch.int64), torch.zeros(local, dtype=torch.int32)
        rows = torch.full((local, most * size, hidden), torch.nan, dtype=x.dtype)
        for source, (theirs, ids) in enumerate(came):
            for expert in range(local):
                tokens = (ids == self.rank * local + expert).any(dim=1).nonzero()[:, 0]
                begin, count = int(counts[expert]), len(tokens)
                rows[expert, begin : begin + count] = theirs[tokens]
                info[expert, begin : begin + count] = tokens.int()
                ranges[expert, source] = begin << 32 | count
                counts[expert] += count
        if cumulative_local_expert_recv_stats is not None:
            assert cumulative_local_expert_recv_stats.dtype == torch.int32
            cumulative_local_expert_recv_stats += counts
        handle = (info, ranges, most, hidden, num_experts)
        if not use_fp8:
            given, hook = self._received(rows, return_recv_hook)
            return given, counts, handle, EventOverlap(), hook
        packed, scales = quantised(rows)
        given, hook = self._received(packed, return_recv_hook)
        return (given, scales), counts, handle, EventOverlap(), hook

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Callable[[], None] | None]:
        info, ranges, most, hidden, num_experts = handle
        size, local = self.group_size, num_experts // self.group_size
        self._check_low_latency(x, topk_idx, most, num_experts)
        assert x.shape == (local, most * size, hidden)
        assert topk_weights.shape == topk_idx.shape
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        assert not (zero_copy and use_logfmt)
        assert not (async_finish and return_recv_hook)
        came = self._exchange(x[info >= 0], info[info >= 0].long(), (info >= 0).sum(dim=1), ranges)
        terms = torch.zeros((*topk_idx.shape, hidden))
        for owner, (theirs, tokens, counts, places) in enumerate(came):
            firsts = (counts.cumsum(0) - counts + (places[:, self.rank] >> 32)).tolist()
            for expert, first in enumerate(firsts):
                last = first + (int(places[expert, self.rank]) & 0xFFFFFFFF)
                mine = tokens[first:last]
                wants = topk_idx[mine] == owner * local + expert
                assert bool(wants.any(dim=1).all()), "other ids than those that were dispatched"
                terms[mine, wants.int().argmax(dim=1)] = theirs[first:last].float()
        total = torch.zeros((topk_idx.shape[0], hidden))
        for k in range(topk_idx.shape[1]):
            total += torch.where(topk_idx[:, k : k + 1] >= 0, terms[:, k] * topk_weights[:, k : k + 1], 0)
        given, hook = self._received(total.to(x.dtype), return_recv_hook)
        if out is not None:
            out.copy_(given)
        return given if out is None else out, EventOverlap(), hook

    # -- high throughput --

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return _config(num_ranks)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return _config(num_ranks)

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        assert topk_idx.dtype == topk_idx_t
        assert topk_idx.is_contiguous()
        assert num_experts % self.group_size == 0
        assert not topk_idx.numel() or int(topk_idx.max()) < num_experts
        local = num_experts // self.group_size
        goes = ((topk_idx // local)[:, :, None] == torch.arange(self.group_size)) & (topk_idx >= 0)[:, :, None]
        in_rank = goes.any(dim=1)
        by_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        return in_rank.sum(dim=0).int(), None, by_expert, in_rank, EventOverlap()

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, list[int], tuple[Any, ...], EventOverlap]:
        assert self._alive
        assert handle is None, "the double knows no cached layouts"
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None
        assert topk_weights is not None
        x, scales = _apart(x)
        _check_rows(x, *scales)
        assert OPEN or x.shape[1] * x.element_size() % 16 == 0
        assert topk_weights.dtype == torch.float32
        assert topk_weights.shape == topk_idx.shape
        needed = (config or _config(self.group_size)).get_nvl_buffer_size_hint(x.shape[1] * 2, self.group_size)
        assert self.num_nvl_bytes >= needed, "buffer too small"
        num_experts = len(num_tokens_per_expert)
        told = (num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank)
        by_rank, _, by_expert, in_rank, _ = self.get_dispatch_layout(topk_idx, num_experts)
        for given, right in zip(told, (by_rank, by_expert, in_rank), strict=True):
            assert given.dtype == right.dtype
            assert torch.equal(given, right), "a layout of other ids"
        came = self._exchange(x, topk_idx, topk_weights, *scales)
        rows, ids, weights, sources = _by_rank(came, self.rank, num_experts)
        local = num_experts // self.group_size
        counts = [-(-int((ids == expert).sum()) // expert_alignment) * expert_alignment for expert in range(local)]
        return rows, ids, weights, counts, (sources, len(x)), EventOverlap()

    def combine(
        self,
        x: Tensor,
        handle: tuple[Any, ...],
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        assert self._alive
        sources, num_rows = handle
        _check_rows(x)
        assert len(x) == len(sources), "as many rows as came"
        return _add_up(self._exchange(x, sources), self.rank, num_rows).to(x.dtype), None, EventOverlap()

    # -- within --

    def _check_low_latency(self, x: Tensor, topk_idx: Tensor, most: int, num_experts: int) -> None:
        assert self._alive
        assert self.low_latency_mode
        assert self.nvshmem_qp_depth >= (most + 1) * 2
        assert num_experts % self.group_size == 0
        assert self._num_qps == num_experts // self.group_size, "as many queues as local experts"
        assert topk_idx.dtype == topk_idx_t
        assert topk_idx.is_contiguous()
        assert not topk_idx.numel() or int(topk_idx.max()) < num_experts
        _check_rows(x)
        if not OPEN:
            assert x.shape[-1] in HIDDEN
            assert topk_idx.shape[1] <= MOST_TOP_K
            assert most <= MOST_ROWS
            assert self.group_size * most % 4 == 0

    def _received(self, result: Tensor, with_hook: bool) -> tuple[Tensor, Callable[[], None] | None]:
        """A result in one of two buffers: with it the one before the last is gone; before the hook there is none."""
        given = torch.full_like(result, torch.nan) if with_hook else result
        self._held.append(given)
        if len(self._held) > 2:
            self._held.popleft().fill_(torch.nan)

        def receive() -> None:
            given.copy_(result)

        return given, receive if with_hook else None

    def _exchange(self, *tensors: Tensor) -> list[list[Tensor]]:
        """Everybody's tensors, in order of rank."""
        return exchange(self._comm.allgather, tensors)


class ElasticBuffer:
    """Its second interface: without expansion, the host waiting for counts."""

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        self.group, self.rank_idx, self.num_ranks = group, group.rank(), group.size()
        assert callable(group._get_backend)
        assert num_bytes is not None or (num_max_tokens_per_rank and hidden)
        assert self.num_ranks <= 1024
        self.explicitly_destroy, self.num_max_tokens_per_rank = explicitly_destroy, num_max_tokens_per_rank
        self._hidden, self._top_k, self._fp8, self._alive = hidden, num_topk, use_fp8_dispatch, True
        group.barrier()

    def destroy(self) -> None:
        assert self.explicitly_destroy
        assert self._alive
        self._alive = False

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: Any = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Any, EventOverlap]:
        assert self._alive
        assert handle is None, "the double knows no cached layouts"
        assert not do_expand, "the double does not expand"
        assert do_cpu_sync in (None, True), "the double waits for counts"
        assert num_experts is not None
        assert topk_idx is not None
        assert topk_idx.dtype == topk_idx_t
        assert topk_idx.is_contiguous()
        assert num_experts % self.num_ranks == 0
        assert num_experts <= 2048
        assert num_experts // self.num_ranks <= 256
        assert topk_idx.shape[1] <= 32
        assert not topk_idx.numel() or int(topk_idx.max()) < num_experts
        assert self._top_k in (0, topk_idx.shape[1]), "more than there is room for"
        x, scales = _apart(x)
        _check_rows(x, *scales)
        assert self._fp8 == bool(scales), "another type than it has room for"
        assert self._hidden == x.shape[1]
        assert OPEN or x.shape[1] * x.element_size() % 16 == 0
        assert 0 < len(x) <= (num_max_tokens_per_rank or self.num_max_tokens_per_rank), "a rank without rows hangs"
        weights = torch.zeros(topk_idx.shape) if topk_weights is None else topk_weights
        assert weights.dtype == torch.float32
        assert weights.shape == topk_idx.shape
        rows, ids, weights, sources = _by_rank(
            exchange(self.group.allgather, (x, topk_idx, weights, *scales)), self.rank_idx, num_experts
        )
        if cumulative_local_expert_recv_stats is not None:
            counts = torch.bincount(ids[ids >= 0], minlength=len(cumulative_local_expert_recv_stats))
            cumulative_local_expert_recv_stats += counts.int()
        return rows, ids, None if topk_weights is None else weights, (sources, len(x)), EventOverlap()

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        assert self._alive
        sources, num_rows = handle
        _check_rows(x)
        assert len(x) == len(sources), "as many rows as came"
        total = _add_up(exchange(self.group.allgather, (x, sources)), self.rank_idx, num_rows)
        return total.to(x.dtype), None, EventOverlap()


def _by_rank(came: list[list[Tensor]], rank: int, num_experts: int) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Rows in the order of the ranks that they come from (with scales, where such came), with local ids, weights, and
    (rank, row) of each."""
    local = num_experts // len(came)
    parts = []
    for source, (rows, ids, weights, *scales) in enumerate(came):
        here = (ids // local == rank) & (ids >= 0)
        tokens = here.any(dim=1).nonzero()[:, 0]
        sources = torch.stack([torch.full_like(tokens, source), tokens], dim=1)
        local_ids = (ids - rank * local).where(here, -1)
        mine = (local_ids[tokens], weights.where(here, 0)[tokens], sources)
        parts.append((rows_at(rows, tokens), *mine, *(each[tokens] for each in scales)))
    rows, ids, weights, sources, *more = [torch.cat(each) for each in zip(*parts, strict=True)]
    return (rows, *more) if more else rows, ids, weights, sources


def _add_up(came: list[list[Tensor]], rank: int, num_rows: int) -> Tensor:
    """The sums of this rank's rows, of which some may have gone nowhere."""
    total = torch.zeros((num_rows, came[0][0].shape[1]))
    for theirs, whose in came:
        mine = whose[:, 0] == rank
        total[whose[mine, 1]] += theirs[mine].float()
    return total


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as float8 with a scale for each 128 columns."""
    groups = rows.float().view(*rows.shape[:-1], -1, SCALED)
    scales = groups.abs().amax(dim=-1).clamp(min=1e-4) / LARGEST_FP8
    return (groups / scales.unsqueeze(-1)).flatten(-2).to(torch.float8_e4m3fn), scales


def _apart(x: Any) -> tuple[Tensor, list[Tensor]]:
    """Rows, and their scales where they have such."""
    return (x[0], [x[1]]) if isinstance(x, tuple) else (x, [])


def _check_rows(x: Tensor, scales: Tensor | None = None) -> None:
    assert x.is_contiguous()
    if scales is None:
        assert x.dtype == torch.bfloat16 or (OPEN and x.dtype == torch.float32)
    else:
        assert x.dtype == torch.float8_e4m3fn
        assert scales.dtype == torch.float32
        assert scales.shape == (len(x), x.shape[1] // SCALED)


def _config(num_ranks: int) -> Config:
    known = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
    assert OPEN or num_ranks in known, f"Unsupported number of EP ranks: {num_ranks}"
    return Config(Buffer.num_sms)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 128) * 128
