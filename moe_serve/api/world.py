"""GET /world: who is where in the world of this server, as its coordinator knows it now, or why it does not say.

What this front-end knows by itself is told in any case.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Callable
from typing import Protocol

import msgspec

from moe_serve.base.errors import EngineDead
from moe_serve.base.world_messages import WorldAnswer, WorldAsk, WorldStatus
from moe_serve.engine.streams import AsyncEngines

WORLD_SECONDS = 3.0
"""For an answer: less than the patience of any link, so that a coordinator that is stopped is told of in time."""


class World(Protocol):
    async def ask(self) -> WorldStatus:
        """As it stands now. EngineDead if the coordinator does not answer in time."""
        ...


class CoordinatorWorld:
    """`send` puts a question on the link; whoever reads the link gives answers to `hear`, in the loop's thread.

    However many ask at once, one question is under way.
    """

    def __init__(self) -> None:
        self.send: Callable[[WorldAsk], None] | None = None
        self._numbers = itertools.count(1)
        self._number = 0
        self._answer: asyncio.Future[WorldStatus] | None = None
        self._asking: asyncio.Task[WorldStatus] | None = None

    async def ask(self) -> WorldStatus:
        """See World."""
        if self.send is None:
            raise EngineDead("the coordinator is not connected yet")
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(self.send))
            self._asking.add_done_callback(_heard)
        return await asyncio.shield(self._asking)

    async def _ask(self, send: Callable[[WorldAsk], None]) -> WorldStatus:
        self._number = next(self._numbers)
        self._answer = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(WORLD_SECONDS):
                # In a thread: the line to a stopped coordinator may be full, and sending would hold the loop.
                await asyncio.to_thread(send, WorldAsk(self._number))
                return await self._answer
        except TimeoutError as error:
            raise EngineDead(
                f"the coordinator gave no answer in {WORLD_SECONDS:g} s; it lives in the launcher of rank 0, which is "
                "stopped, gone, or cannot be reached from here"
            ) from error

    def hear(self, answer: WorldAnswer) -> None:
        """An answer arrived; one that nobody waits for any more is dropped."""
        if self._answer is not None and answer.number == self._number and not self._answer.done():
            self._answer.set_result(answer.world)


def _heard(asking: asyncio.Task[WorldStatus]) -> None:
    """Hears of a failure too when all who asked have gone: asyncio would print what nobody has heard."""
    if not asking.cancelled():
        asking.exception()


async def world_body(world: World | None, engines: AsyncEngines, why_not_ready: str | None) -> tuple[object, int]:
    """The answer's body and its HTTP status. Without the coordinator's word 503, and what this process knows."""
    status: WorldStatus | None = None
    try:
        if world is None:
            raise EngineDead("no coordinator is connected")
        status, reason = await world.ask(), ""
    except EngineDead as error:
        reason = str(error)
    ranks = [
        {"dp": dp, "step": report.step, "running": report.num_running, "waiting": report.num_waiting}
        for dp, report in sorted(engines.reports.items())
    ]
    frontend = {"pid": os.getpid(), "host": socket.gethostname(), "not_ready": why_not_ready, "ranks": ranks}
    told = None if status is None else msgspec.to_builtins(status)
    return {"world": told, "reason": reason, "frontend": frontend}, 200 if status is not None else 503
