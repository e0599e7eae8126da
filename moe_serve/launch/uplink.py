"""A launcher's line to the coordinator that another launcher holds: found, joined, heard. One event loop owns it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Sequence

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError, NotYet, RankTimeout
from moe_serve.base.messages import EngineAt, Hello, Retire, Stop, ToMember, WorldReady
from moe_serve.base.progress import Phase, Progress
from moe_serve.launch.meeting_place import MeetingPlace
from moe_serve.launch.site import name_of_this_node
from moe_serve.world.link import Link
from moe_serve.world.members import named_ranks

TRY_SECONDS = 2.0
REMIND_SECONDS = 15.0
ELSEWHERE = "rank 0's node"
"""Of whoever ends the world, where its line has only closed."""
log = logging.getLogger(__name__)


class Uplink:
    """For the launcher of these DP `ranks`, or of one of an engine's other nodes (`node_rank` from 1 on). `join()`,
    then wait on `ready` and `ended`; `stop` says why."""

    def __init__(self, config: Config, ranks: Sequence[int], *, token: str, worlds: int, node_rank: int = 0) -> None:
        self._config = config
        self._place = MeetingPlace.of(config.parallel)
        self._ranks = list(ranks)
        self._node_rank = node_rank
        self._token = token
        self._worlds = worlds
        self._loop = asyncio.get_running_loop()
        self._link: Link | None = None
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        self.stop: Stop | None = None
        self.front_door = ""
        self.engine_address = ""
        """Where the engine listens for this node's workers, once it has said so."""

    async def join(self) -> None:
        """Until the coordinator takes this launcher in. ConfigError if it refuses, or nobody is there in time."""
        place, patience = self._place, self._config.parallel.start_timeout_seconds
        begun = time.monotonic()
        limit, remind = begun + patience, begun + REMIND_SECONDS
        problem: Exception | None = None
        while time.monotonic() < limit and self.stop is None:
            try:
                self._link = await asyncio.to_thread(self._connect)
                return
            except NotYet as error:
                problem, limit = error, min(limit, time.monotonic() + error.patience_seconds)
            except RankTimeout as error:
                problem, limit = error, begun + patience
            if time.monotonic() > remind:
                waited = time.monotonic() - begun
                log.info("waiting for %s at %s, %.0f s: %s", place.first, place.where, waited, problem)
                remind += REMIND_SECONDS
            await asyncio.sleep(0.2)
        if self.stop is None:
            who = f"node {self._node_rank}" if self._node_rank else named_ranks(self._ranks)
            unreached = f"options {place.host_option}, {place.port_option} and --start-timeout-seconds"
            raise ConfigError(
                f"{who} could not join {place.first} at {place.where} within {time.monotonic() - begun:.0f} s: "
                f"{problem} ({place.once if isinstance(problem, NotYet) else unreached})"
            )

    @property
    def generation(self) -> int:
        return 0 if self._link is None else self._link.view.generation

    @property
    def placement(self) -> str:
        """Digest of the first placement of experts that the coordinator counts on."""
        return "" if self._link is None else self._link.view.placement

    @property
    def number(self) -> int:
        return 0 if self._link is None else self._link.view.number

    def retire(self, timeout: float) -> None:
        """Ask for the end of the world, after what is in flight on this node."""
        if self._link is not None:
            self._link.send(Retire(timeout))

    def end(self, stop: Stop) -> None:
        """The first reason stays."""
        if self.stop is None:
            self.stop = stop
            self.ended.set()

    def close(self, reason: str) -> None:
        if self._link is not None:
            self._link.close(reason)

    def _connect(self) -> Link:
        hello = Hello(
            role="launcher",
            pid=os.getpid(),
            host=socket.gethostname(),
            agreement=self._config.agreement(),
            essential=bool(self._ranks or self._node_rank),
            node=name_of_this_node(),
            ranks=self._ranks,
            node_rank=self._node_rank or -1,
            worlds=self._worlds,
        )
        progress = Progress()
        progress.enter(Phase.ASLEEP)
        return Link(
            self._place.host,
            self._place.port,
            hello,
            token=self._token,
            on_message=self._hear,
            on_lost=self._lose,
            progress=progress,
            connect_seconds=TRY_SECONDS,
        )

    def _lose(self, why: str) -> None:
        self._loop.call_soon_threadsafe(self.end, Stop(why, 1, ELSEWHERE))

    def _hear(self, message: ToMember) -> None:
        if isinstance(message, Stop):
            self._loop.call_soon_threadsafe(self.end, message)
        elif isinstance(message, WorldReady):
            self._loop.call_soon_threadsafe(self._be_ready, message)
        elif isinstance(message, EngineAt):
            self.engine_address = message.address

    def _be_ready(self, message: WorldReady) -> None:
        self.front_door = message.front_door
        self.ready.set()
