"""What a step gave, from the last pipeline stage to those before it, where every stage runs the engine itself."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import msgspec
import torch
from torch import Tensor

from moe_serve.base.commands import Meeting, Reply, StepResult
from moe_serve.base.errors import EngineError
from moe_serve.base.messages import UNREADABLE
from moe_serve.parallel.groups import control_group
from moe_serve.parallel.pending import Pending

MAX_BYTES = 1 << 30


class StageResults:
    """`stages`: global ranks with the same place in every stage, in order, `rank` among them."""

    def __init__(self, meeting: Meeting, stages: Sequence[int], rank: int, *, timeout_seconds: float) -> None:
        self._control = control_group(
            "stage results",
            rank,
            stages,
            store_host=meeting.store_host,
            store_port=meeting.store_port,
            token=meeting.token,
            timeout_seconds=timeout_seconds,
            generation=meeting.generation,
        )
        self._group = self._control.group
        self._last = self._group.size - 1
        self._sent: list[Pending[Tensor]] = []

    def exchange(self, own: Reply) -> Future[Reply]:
        """The last stage's result, for what this stage's worker answered to the same step."""
        if not isinstance(own, StepResult):
            raise EngineError(f"a worker answered a step with {type(own).__name__}")
        if self._group.rank == self._last:
            self._send(own)
            done: Future[Reply] = Future()
            done.set_result(own)
            return done
        return _Awaited(self, own)

    def close(self) -> None:
        """Leave the group. Safe to call twice."""
        self._control.close()

    def _send(self, result: StepResult) -> None:
        """Without waiting for the stages before: they may be a step behind. What they have not taken yet must be."""
        for pending in self._sent:
            pending.wait()
        encoded = torch.frombuffer(bytearray(msgspec.msgpack.encode(result)), dtype=torch.uint8)
        size = torch.tensor([len(encoded)], dtype=torch.int64)
        self._sent = [self._group.start_send(part, to) for to in range(self._last) for part in (size, encoded)]

    def receive(self) -> StepResult:
        """The next one of the last stage's."""
        size = int(self._group.receive(torch.empty(1, dtype=torch.int64), self._last).item())
        if not 0 < size <= MAX_BYTES:
            raise EngineError(f"the last pipeline stage announced a result of {size} bytes")
        encoded = self._group.receive(torch.empty(size, dtype=torch.uint8), self._last)
        try:
            return msgspec.msgpack.decode(encoded.numpy().tobytes(), type=StepResult)
        except UNREADABLE as error:
            raise EngineError(f"the last pipeline stage sent what is no result: {error}") from error


class _Awaited(Future[Reply]):
    """Received when it is asked for, by the one thread that asks; the group's patience goes before a time-out."""

    def __init__(self, results: StageResults, own: StepResult) -> None:
        super().__init__()
        self._results = results
        self._own = own

    def result(self, timeout: float | None = None) -> Reply:
        if not self.done():
            got = self._results.receive()
            if got.step != self._own.step:
                raise EngineError(f"the last pipeline stage is in step {got.step}, this one in step {self._own.step}")
            self.set_result(got)
        return super().result(timeout)
