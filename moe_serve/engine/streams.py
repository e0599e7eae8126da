"""What a front-end asks of the engines, and a sequence's events on their way to whoever waits for them. Torch-free."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from typing import Protocol, Self

from moe_serve.base.engine_messages import LoadReport, TokenEvent
from moe_serve.base.errors import EngineDead, RequestError, RequestFailed
from moe_serve.base.sampling import SamplingParams
from moe_serve.engine.admission import EngineRoom


class SequenceStream(Protocol):
    """Events of one sequence, the last with a finish_reason. Closing it early aborts the request; close it always.

    Iterating raises EngineDead when the world breaks, RequestError where the engine refuses and RequestFailed where it
    cannot go on with this one.
    """

    @property
    def rank(self) -> int:
        """The DP rank that serves the sequence."""
        ...

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...

    async def __anext__(self) -> TokenEvent: ...

    async def aclose(self) -> None: ...


class AsyncEngines(Protocol):
    """What the HTTP floor needs of the engines."""

    @property
    def ready(self) -> bool: ...

    @property
    def alive(self) -> bool: ...

    @property
    def dead_reason(self) -> str | None: ...

    @property
    def data_parallel_size(self) -> int: ...

    @property
    def served(self) -> Collection[int]:
        """DP ranks that this front-end sends requests to."""
        ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def reports(self) -> Mapping[int, LoadReport]: ...

    @property
    def running(self) -> Mapping[int, Mapping[str, str]]:
        """What runs in each engine where an option left the choice open: option -> value, by DP rank."""
        ...

    @property
    def room(self) -> EngineRoom:
        """What the engines that this front-end serves can hold at once; known once they are ready."""
        ...

    async def submit(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: SamplingParams,
        *,
        dp_rank: int | None = None,
        group: str = "",
    ) -> SequenceStream:
        """Choose a DP rank (`dp_rank` if given), send one sequence there, and follow it.

        Sequences of one `group` take turns with other groups as one.

        Raises EngineDead when the world is broken and RequestError for what cannot be.
        """
        ...


class SubmittedStream:
    """SequenceStream fed by a queue. `leave` is called once, at the end: True if the last event has come.

    A stream whose last event was taken stays open until it is closed or asked for more: who drains the server waits
    for open streams, and that event may still be on its way to a client that reads slowly.
    """

    def __init__(
        self, rank: int, events: asyncio.Queue[TokenEvent | EngineDead], leave: Callable[[bool], Awaitable[None]]
    ) -> None:
        self._rank = rank
        self._events = events
        self._leave = leave
        self._finished = False
        self._open = True

    @property
    def rank(self) -> int:
        return self._rank

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._finished or not self._open:
            await self.aclose()
            raise StopAsyncIteration
        event = await self._events.get()
        if isinstance(event, EngineDead):
            await self.aclose()
            raise event
        self._finished = event.finish_reason is not None
        if event.finish_reason == "error":
            await self.aclose()
            if event.failed:
                raise RequestFailed(event.error or "the engine could not go on with this request")
            raise RequestError(event.error or "the engine refused this request")
        return event

    async def aclose(self) -> None:
        if self._open:
            self._open = False
            await self._leave(self._finished)
