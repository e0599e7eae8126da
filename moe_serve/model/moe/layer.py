"""A mixture-of-experts layer: route, map, dispatch, compute, combine.

Shape letters: T tokens of this engine, S rows of this rank (its part of T), D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from moe_kernels.recording import apart
from torch import Tensor, nn

from moe_serve.base.progress import Phase
from moe_serve.base.topology import split_range
from moe_serve.model.all2all.alone import Alone
from moe_serve.model.all2all.base import All2All, RankMajor
from moe_serve.model.context import ForwardContext
from moe_serve.model.layers.mlp import SharedExpert
from moe_serve.model.moe.expert_map import ExpertMap
from moe_serve.model.moe.experts import Experts
from moe_serve.model.moe.router import Router
from moe_serve.model.turns import Turns, take_turns
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.pending import Pending

Value = TypeVar("Value")


class MoELayer(nn.Module):
    """Tensor-parallel ranks hold the same T rows; each takes a part through the experts, so none is computed twice."""

    def __init__(
        self,
        router: Router,
        expert_map: ExpertMap,
        experts: Experts,
        all2all: All2All,
        tp_group: Group,
        shared: SharedExpert | None,
    ) -> None:
        super().__init__()
        self.router, self.expert_map, self.experts, self.shared = router, expert_map, experts, shared
        self.all2all, self.tp_group = all2all, tp_group
        self._stays_here = isinstance(all2all, Alone) and expert_map.is_identity and shared is None

    def forward(self, x_TD: Tensor, ctx: ForwardContext) -> Tensor:
        """(T, D) -> (T, D). Every rank of the expert-parallel group calls this in step, with or without rows."""
        parts, mine = self._parts(x_TD.shape[0])
        out_SD = self._own_rows(x_TD[mine], mine, ctx)
        return out_SD if self.tp_group.size == 1 else apart(partial(self._gather, out_SD, parts), ctx)

    def in_turns(self, x_TD: Tensor, ctx: ForwardContext) -> Turns[Tensor]:
        """As forward(), but that it yields while rows are on their way."""
        parts, mine = self._parts(x_TD.shape[0])
        ids_SK, weights_SK = self.router(x_TD[mine])
        out_SD = yield from self._travel(x_TD[mine], ids_SK, weights_SK, mine, ctx)
        return out_SD if self.tp_group.size == 1 else self._gather(out_SD, parts, ctx)

    def _parts(self, num_rows: int) -> tuple[list[range], slice]:
        """Of so many rows each tensor rank's, and this one's."""
        tp = self.tp_group
        parts = [split_range(num_rows, tp.size, rank) for rank in range(tp.size)]
        return parts, slice(parts[tp.rank].start, parts[tp.rank].stop)

    def _gather(self, out_SD: Tensor, parts: Sequence[range], ctx: ForwardContext) -> Tensor:
        ctx.progress.enter(Phase.TENSOR_PARALLEL)
        return self.tp_group.all_gather_ragged(out_SD, [len(part) for part in parts])

    def _own_rows(self, x_SD: Tensor, mine: slice, ctx: ForwardContext) -> Tensor:
        ids_SK, weights_SK = self.router(x_SD)
        if self._stays_here and ctx.routes is None:
            alone_SD: Tensor = self.experts(RankMajor(x_SD, ids_SK, weights_SK, None))
            return alone_SD
        return apart(partial(self._by_experts, x_SD, ids_SK, weights_SK, mine), ctx)

    def _by_experts(self, x_SD: Tensor, ids_SK: Tensor, weights_SK: Tensor, mine: slice, ctx: ForwardContext) -> Tensor:
        """All of _travel(), without leaving it."""
        return take_turns([self._travel(x_SD, ids_SK, weights_SK, mine, ctx)])[0]

    def _travel(
        self, x_SD: Tensor, ids_SK: Tensor, weights_SK: Tensor, mine: slice, ctx: ForwardContext
    ) -> Turns[Tensor]:
        """To the experts and back; yields when rows have been sent out, and when they have been sent home."""
        if ctx.routes is not None:
            ctx.routes.append(ids_SK.clone())  # the next step's may be put in the same place
        slots_SK = self.expert_map(ids_SK, None if ctx.row_hash_T is None else ctx.row_hash_T[mine])
        slots_SK = slots_SK.to(self.all2all.id_dtype)
        rows, sent = ctx.rows_by_ep_rank, time.perf_counter()
        dispatched = _exchange(Phase.DISPATCH, lambda: self.all2all.dispatch(x_SD, slots_SK, weights_SK, rows), ctx)
        shared_SD = None if self.shared is None else self.shared(x_SD)  # computed while the rows travel
        yield
        arrived = _exchange(Phase.DISPATCH, dispatched.wait, ctx)
        ctx.traced("dispatch", sent, travels=True)
        started = time.perf_counter()
        outputs = self.experts(arrived)
        ctx.traced("experts", started)
        if x_SD.device.type == "cpu":
            ctx.clock.expert_seconds += time.perf_counter() - started
        sent = time.perf_counter()
        combined: Pending[Tensor] = _exchange(Phase.COMBINE, lambda: self.all2all.combine(outputs, arrived), ctx)
        yield
        out_SD = _exchange(Phase.COMBINE, combined.wait, ctx)
        ctx.traced("combine", sent, travels=True)
        return out_SD if shared_SD is None else out_SD + shared_SD


def _exchange(phase: Phase, exchange: Callable[[], Value], ctx: ForwardContext) -> Value:
    """Count an exchange's seconds on the host; on a CUDA device that is the launch, not the transfer.

    Between two exchanges a rank is at its experts again, and others wait for it.
    """
    ctx.progress.enter(phase)
    started = time.perf_counter()
    value = exchange()
    ctx.clock.all2all_seconds += time.perf_counter() - started
    ctx.progress.enter(Phase.EXPERTS)
    return value
