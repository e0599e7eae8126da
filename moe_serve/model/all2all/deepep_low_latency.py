"""DeepEP's kernels for few rows, deep_ep.Buffer of https://github.com/deepseek-ai/DeepEP.

A row travels once to each expert, into memory that has room for the worst case. The host waits for nothing, so it can
be captured in a CUDA graph.

Shape letters: T rows here, K top-k, e local physical experts, D hidden.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import deep_ep
import torch
from torch import Tensor

from moe_serve.base.errors import ConfigError
from moe_serve.model.all2all.base import Arrived, ArrivedForm, Batched
from moe_serve.model.all2all.library import named
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.communicator import MutableCommunicator
from moe_serve.parallel.pending import Pending

QUEUE_DEPTH = "NVSHMEM_QP_DEPTH"
LEAST_QUEUE_DEPTH = 1024
"""NVSHMEM's own."""
ROWS_MULTIPLE = 4
"""Of ranks times rows, so that tables of them can be copied 16 bytes at a time."""


@dataclass(frozen=True, slots=True)
class _Sent:
    handle: tuple[Any, ...]
    slots_TK: Tensor
    weights_TK: Tensor


class DeepEPLowLatency:
    """`low_latency_dispatch` and `low_latency_combine` of deep_ep.Buffer, each begun at once and received by wait().

    combine adds a row's weighted terms in the order of its top k, in float32. Its two buffers take turns: at most two
    results may be held at a time.
    """

    arrives: ClassVar[ArrivedForm] = Batched
    applies_weights: ClassVar[Literal["combine", "experts"]] = "combine"
    id_dtype: ClassVar[torch.dtype] = deep_ep.topk_idx_t
    exact: ClassVar[bool] = True
    padding_rows = 0

    def __init__(self, group: Group, layout: ExpertLayout, shape: DispatchShape) -> None:
        self._num_experts, self._quantises = layout.num_physical, shape.quantisation is not None
        self._max_rows = -(-shape.max_rows // ROWS_MULTIPLE) * ROWS_MULTIPLE
        _deepen_queues(self._max_rows)
        with named("setting up", "deepep_low_latency"):
            num_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(
                self._max_rows, shape.hidden, group.size, layout.num_physical
            )
            self._buffer: Any = deep_ep.Buffer(
                None,
                num_rdma_bytes=num_bytes,
                low_latency_mode=True,
                num_qps_per_rank=layout.num_local(group.rank),
                explicitly_destroy=True,
                comm=MutableCommunicator(group),
            )

    def dispatch(
        self, x_TD: Tensor, physical_ids_TK: Tensor, weights_TK: Tensor, rows_by_rank: Sequence[int]
    ) -> Pending[Arrived]:
        with named("dispatch", "deepep_low_latency"):
            room, counts_e, handle, _, receive = self._buffer.low_latency_dispatch(
                x_TD,
                physical_ids_TK,
                self._max_rows,
                self._num_experts,
                use_fp8=self._quantises,
                return_recv_hook=True,
            )
        rows, scales = room if self._quantises else (room, None)

        def arrived() -> Arrived:
            with named("dispatch", "deepep_low_latency"):
                receive()
            return Batched(rows, counts_e, _Sent(handle, physical_ids_TK, weights_TK), scales=scales)

        return Pending(arrived)

    def combine(self, outputs: Tensor, arrived: Arrived) -> Pending[Tensor]:
        sent = arrived.ticket
        assert isinstance(sent, _Sent)
        with named("combine", "deepep_low_latency"):
            out_TD, _, receive = self._buffer.low_latency_combine(
                outputs, sent.slots_TK, sent.weights_TK, sent.handle, return_recv_hook=True
            )

        def added_up() -> Tensor:
            with named("combine", "deepep_low_latency"):
                receive()
            return out_TD  # type: ignore[no-any-return]

        return Pending(added_up)

    def close(self) -> None:
        """Once; the library's own destructor may hang while an error is on its way up."""
        if self._buffer is not None:
            self._buffer.destroy()
            self._buffer = None


def _deepen_queues(max_rows: int) -> None:
    """A rank posts all its rows and a flag to a queue before it looks whether they are gone."""
    needed = 2 * (max_rows + 1)
    given = os.environ.get(QUEUE_DEPTH)
    if given is not None and int(given) < needed:
        raise ConfigError(
            f"--all2all-backend deepep_low_latency needs {QUEUE_DEPTH} of at least {needed} for steps of {max_rows} "
            f"rows of a rank, and it is {given}; set more, or lower --max-num-batched-tokens"
        )
    os.environ.setdefault(QUEUE_DEPTH, str(max(LEAST_QUEUE_DEPTH, needed)))
