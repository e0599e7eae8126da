"""Communications that move rows rank by rank: documented semantics and refusals, over the communicator of the config.

Places without a row are not a number, and their ids are invalid.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any, ClassVar

import flashinfer
import torch
from flashinfer.fused_moe import QuantFormat
from torch import Tensor

from tests.support.doubles.exchanging import exchange, rows_at

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOP_KS = (1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 22)


@dataclass(frozen=True)
class BootstrapConfig:
    world_size: int
    rank: int
    stream: int = 0
    auto_bootstrap: bool = True
    device: int | None = field(default=None, kw_only=True)
    nccl_comm: int | None = None
    process_group: Any = None
    tcp_store: Any = None

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size


@dataclass(frozen=True)
class MoEEpCommParams:
    num_experts: int
    top_k: int
    max_tokens_per_rank: int
    hidden_size: int
    dtype: torch.dtype | None = None
    dispatch_format: QuantFormat | None = None
    invalid_expert_id: int = -1

    def __post_init__(self) -> None:
        for value in (self.num_experts, self.top_k, self.max_tokens_per_rank, self.hidden_size):
            assert isinstance(value, int)
            assert value > 0
        assert self.top_k <= self.num_experts
        assert not 0 <= self.invalid_expert_id < self.num_experts

    @property
    def token_dtype(self) -> torch.dtype:
        return self.dtype or torch.bfloat16


@dataclass
class NVLinkOneSidedConfig:
    backend_name: str = "nvlink_one_sided"
    extra_payload_bytes_per_token: int = 0
    eplb_stats_num_experts: int = 0
    enable_rank_mask: bool = False
    use_low_precision_combine: bool = False
    comm_backend: Any = None


@dataclass
class NVLinkTwoSidedConfig:
    backend_name: str = "nvlink_two_sided"
    comm_backend: Any = None


@dataclass(frozen=True)
class MoEEpDispatchResult:
    hidden_states: Tensor
    topk_ids: Tensor
    topk_weights: Tensor | None
    tokens_per_rank: int
    hidden_states_scale: Tensor | None = None
    eplb_gathered_stats: Tensor | None = None


class _Communication:
    each_rank_has_places: ClassVar[bool]

    def __init__(self, bootstrap: BootstrapConfig, params: MoEEpCommParams, config: Any = None) -> None:
        comm = config.comm_backend
        assert (comm.Get_rank(), comm.Get_size()) == (bootstrap.rank, bootstrap.world_size)
        assert all(comm.allgather(True))
        assert comm.Split(0, bootstrap.rank).Get_size() == bootstrap.world_size
        assert len(set(comm.allgather(socket.gethostname()))) == 1
        assert comm.allgather(b"handle %d" % bootstrap.rank)[bootstrap.rank] == b"handle %d" % bootstrap.rank
        assert params.num_experts % bootstrap.world_size == 0
        comm.barrier()
        self._comm, self.params = comm, params
        self._dispatched: tuple[list[tuple[int, int, int]], int, int] | None = None
        self._rank, self._size = bootstrap.rank, bootstrap.world_size
        self._local = params.num_experts // self._size

    def dispatch(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor | None = None,
        *,
        hidden_states_scale: Tensor | None = None,
        max_tokens_per_rank: int | None = None,
        eplb_local_stats: Tensor | None = None,
    ) -> MoEEpDispatchResult:
        if self._dispatched is not None:
            raise RuntimeError("dispatch called twice without an intervening combine")
        places = max_tokens_per_rank or self.params.max_tokens_per_rank
        assert 0 < places <= self.params.max_tokens_per_rank
        assert 0 < len(hidden_states) <= places, "dispatch requires at least one row, and has room for so many"
        topk_ids = topk_ids.int()
        assert topk_ids.shape == (len(hidden_states), self.params.top_k)
        assert 0 <= int(topk_ids.min()) <= int(topk_ids.max()) < self.params.num_experts, "memory of others"
        assert topk_weights is not None, "the double sends weights"
        assert topk_weights.shape == topk_ids.shape
        assert topk_weights.dtype == torch.float32
        assert hidden_states.shape[1] == self.params.hidden_size
        beside = [] if hidden_states_scale is None else [hidden_states_scale]
        if self.params.dispatch_format is None:
            assert hidden_states.dtype == self.params.token_dtype
            assert not beside
        else:
            assert self.params.dispatch_format is QuantFormat.DeepSeekFp8
            assert hidden_states.dtype == torch.float8_e4m3fn
            assert beside[0].shape == (len(hidden_states), self.params.hidden_size // 128)
        for each in (hidden_states, topk_ids, topk_weights, *beside):
            assert each.is_contiguous()
            self._check_payload(each)
        assert set(self._comm.allgather(places)) == {places}, "not the same on all ranks"
        came = exchange(self._comm.allgather, (topk_ids, hidden_states, topk_weights, *beside))
        sent = [(hidden_states, torch.nan), (topk_ids, -1)]
        sent += [(each, torch.nan) for each in (topk_weights, *beside)]
        rows, ids, weights, *scales = (
            torch.full((self._size * places, each.shape[1]), empty).to(each.dtype) for each, empty in sent
        )
        sources, end = [], 0
        for source, (their_ids, *theirs) in enumerate(came):
            tokens = (their_ids // self._local == self._rank).any(dim=1).nonzero()[:, 0]
            first = source * places if self.each_rank_has_places else end
            end = first + len(tokens)
            for place, part in zip((ids, rows, weights, *scales), (their_ids, *theirs), strict=True):
                place[first:end] = rows_at(part, tokens)
            sources += [(first + index, source, token) for index, token in enumerate(tokens.tolist())]
        self._dispatched = (sources, len(hidden_states), len(rows))
        return MoEEpDispatchResult(rows, ids, weights, places, scales[0] if scales else None)

    def combine(self, expert_output: Tensor, *, output: Tensor | None = None) -> Tensor:
        if self._dispatched is None:
            raise RuntimeError("combine called before dispatch")
        sources, num_rows, num_places = self._dispatched
        assert expert_output.shape == (num_places, self.params.hidden_size)
        assert expert_output.is_contiguous()
        assert expert_output.dtype in FLOATS[0 if flashinfer.OPEN else 1 :]
        whose = torch.tensor(sources, dtype=torch.int64).reshape(-1, 3)
        total = torch.zeros((num_rows, self.params.hidden_size))
        for outputs, theirs in exchange(self._comm.allgather, (expert_output[whose[:, 0]], whose)):
            mine = theirs[:, 1] == self._rank
            total[theirs[mine, 2]] += outputs[mine].float()
        self._dispatched = None
        return total.to(expert_output.dtype)

    def destroy(self) -> None:
        self._dispatched = None

    def _check_payload(self, payload: Tensor) -> None:
        pass


class NVLinkOneSidedAlltoAll(_Communication):
    each_rank_has_places = True

    def __init__(
        self, bootstrap: BootstrapConfig, params: MoEEpCommParams, config: NVLinkOneSidedConfig | None = None
    ) -> None:
        assert bootstrap.world_size <= 64
        assert flashinfer.OPEN or params.top_k in TOP_KS, "Unsupported top_k"
        super().__init__(bootstrap, params, config)

    def dispatch(
        self,
        hidden_states: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor | None = None,
        *,
        hidden_states_scale: Tensor | None = None,
        max_tokens_per_rank: int | None = None,
        eplb_local_stats: Tensor | None = None,
        active_rank_mask: Tensor | None = None,
    ) -> MoEEpDispatchResult:
        assert active_rank_mask is None, "the double knows no mask"
        return super().dispatch(
            hidden_states,
            topk_ids,
            topk_weights,
            hidden_states_scale=hidden_states_scale,
            max_tokens_per_rank=max_tokens_per_rank,
            eplb_local_stats=eplb_local_stats,
        )

    def combine(
        self, expert_output: Tensor, *, output: Tensor | None = None, active_rank_mask: Tensor | None = None
    ) -> Tensor:
        assert active_rank_mask is None, "the double knows no mask"
        return super().combine(expert_output, output=output)


class NVLinkTwoSidedAlltoAll(_Communication):
    each_rank_has_places = False

    def __init__(
        self, bootstrap: BootstrapConfig, params: MoEEpCommParams, config: NVLinkTwoSidedConfig | None = None
    ) -> None:
        assert params.num_experts % 4 == 0
        assert params.top_k <= 32
        super().__init__(bootstrap, params, config)

    def _check_payload(self, payload: Tensor) -> None:
        if payload.dtype not in (torch.int32,) and payload.shape[1] != self.params.top_k:  # routing travels otherwise
            assert flashinfer.OPEN or payload.shape[1] * payload.element_size() % 16 == 0


def create_communication(
    bootstrap: BootstrapConfig, params: MoEEpCommParams, backend: Any, **options: Any
) -> _Communication:
    kinds: dict[str, type[_Communication]] = {
        "nvlink_one_sided": NVLinkOneSidedAlltoAll,
        "nvlink_two_sided": NVLinkTwoSidedAlltoAll,
    }
    return kinds[backend.backend_name](bootstrap, params, config=backend, **options)
