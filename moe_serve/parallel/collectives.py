"""Collectives over one torch process group, free of charge in a group of one. The only file that calls torch's.

Ragged exchanges and every gather and reduce-scatter between CPUs go through all-to-all: gloo has it with ragged
sizes, in half the time of its all-gather and reduce-scatter, and a sum made at home has a fixed order (that of the
ranks) and float32 inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import AllreduceOptions, BroadcastOptions, ReduceOp, Work

from moe_serve.base.errors import EngineError, RankTimeout
from moe_serve.parallel.pending import Pending
from moe_serve.parallel.process_groups import ProcessGroup

Value = TypeVar("Value")


class Group:
    """The ranks of one axis. `rank` and `size` are the group's own; `ranks` the global ones, in order.

    Calls are made in the same order on every rank, from one thread. Sizes are known to all beforehand.
    """

    def __init__(
        self,
        process_group: ProcessGroup | None,
        *,
        name: str,
        rank: int,
        ranks: Sequence[int],
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        if process_group is None and len(ranks) > 1:
            raise ValueError(f"group {name!r} of {len(ranks)} ranks needs a process group")
        self.name = name
        self.rank = rank
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.device = device
        self._process_group = process_group if self.size > 1 else None
        self.timeout_seconds = timeout_seconds
        self._on_cpu = device.type == "cpu"
        self.transport = "none" if self.size == 1 else "gloo" if self._on_cpu else "nccl"
        """What sums and gathers travel with."""
        self._ones = [1] * self.size
        self._sum = _reduce_options(ReduceOp.SUM)
        self._min = _reduce_options(ReduceOp.MIN)
        self._from = [_broadcast_options(source) for source in range(self.size)]

    @property
    def process_group(self) -> ProcessGroup | None:
        """torch's, for libraries that take its communicator; None in a group of one."""
        return self._process_group

    # -- equal sizes --

    def all_gather(self, x: Tensor) -> Tensor:
        """Everybody's `x` (equal shapes) one after the other on dimension 0."""
        return self.all_gather_ragged(x, [x.shape[0]] * self.size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks; the same bits everywhere. `x` itself may be overwritten."""
        return self._reduce("all_reduce", x, self._sum)

    def all_reduce_min(self, x: Tensor) -> Tensor:
        """The least over the ranks, element by element. `x` itself may be overwritten."""
        return self._reduce("all_reduce_min", x, self._min)

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """`source`'s `x` everywhere; `source` is a rank of the group. Others' `x` is overwritten."""
        return self.start_broadcast(x, source).wait()

    def start_broadcast(self, x: Tensor, source: int) -> Pending[Tensor]:
        if self._process_group is None:
            return Pending(lambda: x)
        x = x.contiguous()
        work = self._launch("broadcast", self._process_group.broadcast, [x], self._from[source])
        return self._pending("broadcast", work, lambda: x)

    # -- from one to one --

    def start_send(self, x: Tensor, to: int) -> Pending[Tensor]:
        """`x` to another rank of the group, which calls receive(). Nobody may change `x` before wait()."""
        assert self._process_group is not None
        x = x.contiguous()
        work = self._launch("send", self._process_group.send, [x], to, 0)
        return self._pending("send", work, lambda: x)  # which keeps it alive

    def receive(self, out: Tensor, source: int, *, timeout_seconds: float | None = None) -> Tensor:
        """What `source` sends, of the shape and type of `out`, in the order in which it sends.

        `timeout_seconds` to wait for it, where those of the group are too few or too many.
        """
        assert self._process_group is not None
        work = self._launch("receive", self._process_group.recv, [out], source, 0)
        return self._pending("receive", work, lambda: out, timeout_seconds).wait()

    # -- ragged sizes --

    def all_gather_ragged(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Everybody's rows one after the other; rank i brings sizes[i]."""
        return self.start_all_gather_ragged(x, sizes).wait()

    def start_all_gather_ragged(self, x: Tensor, sizes: Sequence[int]) -> Pending[Tensor]:
        if self._process_group is None:
            return Pending(lambda: x)
        out = x.new_empty((sum(sizes), *x.shape[1:]))
        if not self._on_cpu and len(set(sizes)) == 1:
            gather = self._process_group._allgather_base
            work = self._launch("all_gather", gather, out, x.contiguous())
        else:
            copies = x.repeat(self.size, *[1] * (x.dim() - 1))
            work = self._all_to_all("all_gather", out, copies, sizes, [x.shape[0]] * self.size)
        return self._pending("all_gather", work, lambda: out)

    def reduce_scatter_ragged(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Rows summed over the ranks; rank i keeps its sizes[i] of them. Added in order of rank on a CPU."""
        return self.start_reduce_scatter_ragged(x, sizes).wait()

    def start_reduce_scatter_ragged(self, x: Tensor, sizes: Sequence[int]) -> Pending[Tensor]:
        if self._process_group is None:
            return Pending(lambda: x)
        mine = sizes[self.rank]
        if not self._on_cpu and len(set(sizes)) == 1:
            out = x.new_empty((mine, *x.shape[1:]))
            scatter = self._process_group._reduce_scatter_base
            work = self._launch("reduce_scatter", scatter, out, x.contiguous())
            return self._pending("reduce_scatter", work, lambda: out)
        parts = x.new_empty((self.size * mine, *x.shape[1:]))
        work = self._all_to_all("reduce_scatter", parts, x.contiguous(), [mine] * self.size, sizes)
        return self._pending("reduce_scatter", work, lambda: sum_parts(parts.view(self.size, mine, *x.shape[1:])))

    def all_to_all_ragged(self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """The next send_counts[i] rows of `x` go to rank i; gives what came, recv_counts[i] rows from rank i."""
        return self.start_all_to_all_ragged(x, send_counts, recv_counts).wait()

    def start_all_to_all_ragged(
        self, x: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> Pending[Tensor]:
        if self._process_group is None:
            return Pending(lambda: x)
        out = x.new_empty((sum(recv_counts), *x.shape[1:]))
        work = self._all_to_all("all_to_all", out, x.contiguous(), recv_counts, send_counts)
        return self._pending("all_to_all", work, lambda: out)

    def exchange_rows(self, x: Tensor) -> Tensor:
        """Row i of `x` (one per rank) goes to rank i; gives row j from rank j."""
        return self.all_to_all_ragged(x, self._ones, self._ones)

    # -- life --

    def failure(self, what: str, error: RuntimeError, timeout_seconds: float | None = None) -> EngineError:
        """The error to raise for a collective that failed: what was done, with whom, and what torch says of it."""
        others = ", ".join(str(rank) for rank in self.ranks if rank != self.ranks[self.rank])
        reason = (str(error).splitlines() or ["unknown"])[0]
        message = (
            f"{what} in group {self.name!r} failed on rank {self.ranks[self.rank]}: one of ranks {others} "
            f"is gone or did not come within {timeout_seconds or self.timeout_seconds:g} s ({reason})"
        )
        timed_out = "timed out" in reason.lower() or "timeout" in reason.lower()
        return RankTimeout(message) if timed_out else EngineError(message)

    def close(self) -> None:
        """Leave the group; its connections close. Safe to call twice."""
        if self._process_group is not None and not self._on_cpu:
            self._process_group.shutdown()
        self._process_group = None

    def _reduce(self, what: str, x: Tensor, options: Any) -> Tensor:
        if self._process_group is None:
            return x
        x = x.contiguous()
        work = self._launch(what, self._process_group.allreduce, [x], options)
        return self._pending(what, work, lambda: x).wait()

    def _pending(
        self, what: str, work: Work, finish: Callable[[], Value], timeout_seconds: float | None = None
    ) -> Pending[Value]:
        """A collective under way; its failure names the ranks."""

        def wait() -> Value:
            try:
                if timeout_seconds is None:
                    work.wait()
                else:
                    work.wait(timedelta(seconds=timeout_seconds))
            except RuntimeError as error:
                raise self.failure(what, error, timeout_seconds) from error
            return finish()

        return Pending(wait, work.is_completed)

    def _all_to_all(
        self, what: str, out: Tensor, x: Tensor, recv_counts: Sequence[int], send_counts: Sequence[int]
    ) -> Work:
        assert self._process_group is not None
        return self._launch(what, self._process_group.alltoall_base, out, x, recv_counts, send_counts)

    def _launch(self, what: str, collective: Callable[..., Work], *args: Any) -> Work:
        try:
            return collective(*args)
        except RuntimeError as error:
            raise self.failure(what, error) from error


def alone(name: str, rank: int, device: torch.device) -> Group:
    """A group of one: every collective gives its input back."""
    return Group(None, name=name, rank=0, ranks=(rank,), device=device, timeout_seconds=0)


def sum_parts(parts: Tensor, out: Tensor | None = None) -> Tensor:
    """(count, n, ...) -> (n, ...), added first to last, in float32 where the type has 16 bits; in `out` if given."""
    if len(parts) == 2:
        return torch.add(parts[0], parts[1], out=out)  # the same bits: it rounds once, too
    wide = parts.float() if parts.dtype in (torch.bfloat16, torch.float16) else parts
    total = wide[0].clone()
    for part in wide[1:]:
        total += part
    out = torch.empty_like(parts[0]) if out is None else out
    out.copy_(total)
    return out


def _reduce_options(operation: Any) -> Any:
    options = AllreduceOptions()
    options.reduceOp = operation
    return options


def _broadcast_options(source: int) -> Any:
    options = BroadcastOptions()
    options.rootRank = source
    return options
