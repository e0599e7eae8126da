"""A real coordinator on 127.0.0.1 in a thread of its own, and links to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from moe_serve.base.messages import Hello, Role, Stop, ToMember
from moe_serve.base.progress import Progress
from moe_serve.base.topology import Topology
from moe_serve.eplb.rebalancer import Rebalancer
from moe_serve.world.coordinator import Coordinator
from moe_serve.world.fleet import Fleet
from moe_serve.world.link import Link
from moe_serve.world.outbox import MAX_WAITING_BYTES
from moe_serve.world.solver import SOLVE_SECONDS

HOST = "127.0.0.1"
CALL_SECONDS = 5.0
TOKEN = "token of a test world"


class RunningCoordinator:
    """Of a world without worker processes. `close()` it in the end."""

    def __init__(
        self,
        topology: Topology,
        agreement: Mapping[str, str],
        *,
        token: str = "token of a test world",
        rebalancer: Rebalancer | None = None,
        solve_seconds: float = SOLVE_SECONDS,
        outbox_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        self.token = token
        self._agreement = dict(agreement)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        fleet = Fleet(
            topology=topology,
            agreement=agreement,
            has_workers=False,
            step_timeout_seconds=60,
            rebalancer=rebalancer,
        )
        self.coordinator = Coordinator(fleet, token=token, solve_seconds=solve_seconds, outbox_bytes=outbox_bytes)
        self.port: int = asyncio.run_coroutine_threadsafe(self.coordinator.start(HOST, 0), self._loop).result(
            CALL_SECONDS
        )

    def join(
        self,
        dp: int = -1,
        *,
        role: Role = "engine",
        token: str | None = None,
        agreement: Mapping[str, str] | None = None,
    ) -> tuple[Link, queue.Queue[ToMember], queue.Queue[str]]:
        """A link that says it is engine `dp`, or another; what it hears, and why it was lost."""
        heard: queue.Queue[ToMember] = queue.Queue()
        lost: queue.Queue[str] = queue.Queue()
        hello = Hello(
            role=role,
            dp=dp,
            pid=os.getpid(),
            host="here",
            agreement=dict(agreement or self._agreement),
        )
        link = Link(
            HOST,
            self.port,
            hello,
            token=token or self.token,
            on_message=heard.put,
            on_lost=lost.put,
            progress=Progress(),
            connect_seconds=2,
        )
        return link, heard, lost

    def wait_ready(self, seconds: float) -> str:
        """Where the front-end listens, once the world is ready."""
        deadline = time.monotonic() + seconds
        while not self.coordinator.fleet.ready:
            ended = self.coordinator.fleet.ended
            assert ended is None, ended
            assert time.monotonic() < deadline, self.coordinator.fleet.missing()
            time.sleep(0.02)
        return self.coordinator.fleet.front_door()

    def call(self, step: Callable[[], object]) -> None:
        """Have something done in the event loop."""
        self._loop.call_soon_threadsafe(step)

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[float]]:
        """Seconds of its thread's CPU that the event loop spent between two looks at it, while the context is open.

        CPU, not time: on a machine where others compute, time tells of them.
        """
        spent: list[float] = []

        async def watch() -> None:
            while True:
                before = time.thread_time()
                await asyncio.sleep(0.001)
                spent.append(time.thread_time() - before)

        watching = asyncio.run_coroutine_threadsafe(watch(), self._loop)
        try:
            yield spent
        finally:
            watching.cancel()

    def end(self, stop: Stop) -> None:
        """Tell everybody to stop."""
        self._loop.call_soon_threadsafe(self.coordinator.end, stop)

    def close(self) -> None:
        """End it; safe to call twice."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self.coordinator.close(), self._loop).result(CALL_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_SECONDS)
        self._loop.close()
