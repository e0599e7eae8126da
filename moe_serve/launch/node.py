"""Which processes this node starts, in what order, and how they end.

A launcher starts one process per engine of its own and, where asked to, an API server; one of the launchers of a
world holds the coordinator. Children are told an address and a token, nothing else: they find each other through the
coordinator, also on another machine. They are not tied to this process either: whoever loses the coordinator ends
itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from moe_serve.base.config import Config
from moe_serve.base.messages import Stop
from moe_serve.base.model_config import load_model_config
from moe_serve.base.secret import TOKEN_ENVIRONMENT, check_token, new_token
from moe_serve.base.site import local_address
from moe_serve.eplb.build import make_rebalancer
from moe_serve.eplb.first_placement import placement_digest
from moe_serve.launch.children import Children
from moe_serve.launch.site import make_site, name_of_this_node
from moe_serve.world.coordinator import Coordinator
from moe_serve.world.fleet import Fleet
from moe_serve.world.member import MemberSpec

CONNECT_SECONDS = 1.0
"""The coordinator listens before it starts a child: one that cannot reach it is an orphan."""
JOIN_SECONDS = 60.0
"""A launcher that joins may be started before the one that holds the coordinator."""
WATCH_SECONDS = 0.1
HEARSAY_SECONDS = 0.3
REMIND_SECONDS = 15.0
START_SECONDS = 1800.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePart:
    """What of a world one launcher starts. `dp_ranks` whose engines: all of them if None.

    `joins` is where a coordinator listens that another launcher holds; if None, this one holds it. Then the API
    server is one that the world waits for and ends with; elsewhere it may come and go. It `serves` these DP ranks
    (None: all).
    """

    serve_http: bool = True
    dp_ranks: tuple[int, ...] | None = None
    joins: tuple[str, int] | None = None
    serves: list[int] | None = None


class Node:
    """The children of one machine and, unless it joins, the coordinator. `config` must be resolved.

    One event loop owns it. `token` of the world; where none is given, from the environment or a new one.
    """

    def __init__(self, config: Config, part: NodePart, *, token: str = "") -> None:
        self.config = config
        self.token = check_token(token or os.environ.get(TOKEN_ENVIRONMENT) or new_token())
        self.host, self.port = part.joins or (config.parallel.data_parallel_master_ip, 0)
        self._part = part
        dp_size = config.parallel.data_parallel_size
        self._dp_ranks = tuple(range(dp_size)) if part.dp_ranks is None else part.dp_ranks
        self._children = Children(token=self.token, node=name_of_this_node())
        self._coordinator = Coordinator(_make_fleet(config), token=self.token) if part.joins is None else None
        self._ended: Stop | None = None

    @property
    def ended(self) -> Stop | None:
        """Why the world has ended, as far as this node can know."""
        return self._ended if self._coordinator is None else self._coordinator.fleet.ended

    @property
    def address(self) -> str:
        """This machine's own, on the way to the coordinator."""
        return local_address(self.host, self.port)

    async def start(self) -> None:
        """Open the coordinator if it is held here, then start the children."""
        if self._coordinator is not None:
            self.port = await self._coordinator.start(self.host, self.config.parallel.coordinator_port)
        for dp in self._dp_ranks:
            self._start_child(f"engine dp {dp}", "moe_serve.engine.process", dp=dp)
        if self._part.serve_http:
            self._start_child("API server", "moe_serve.api.server")

    async def until_ready(self) -> None:
        """Until every member is ready or the world has ended; who is missing is logged now and then.

        A node that joins is not told: it returns at once.
        """
        coordinator = self._coordinator
        deadline = time.monotonic() + START_SECONDS
        remind = time.monotonic() + REMIND_SECONDS
        while coordinator is not None and not (coordinator.ready.is_set() or coordinator.ended.is_set()):
            await self._watch_once()
            missing = ", ".join(coordinator.fleet.missing())
            if time.monotonic() > deadline:
                self.end(Stop(f"not ready within {START_SECONDS:g} s; missing: {missing}", 1))
            elif time.monotonic() > remind:
                log.info("still waiting for: %s", missing)
                remind = time.monotonic() + REMIND_SECONDS

    async def until_ended(self) -> Stop:
        """Until the world has ended; for a node that joins, until one of its children has."""
        while self.ended is None:
            await self._watch_once()
        return self.ended

    def front_door(self) -> str:
        """Where the API server says it listens, as host:port; "" where the coordinator is held elsewhere."""
        return "" if self._coordinator is None else self._coordinator.fleet.front_door()

    def drain(self, timeout: float) -> None:
        """Finish what is in flight in the whole world, then end. A node that joins can only leave."""
        if self._coordinator is not None:
            self._coordinator.drain(timeout)
        else:
            self.end(Stop("asked to stop", 0))

    def end(self, stop: Stop) -> None:
        """End for a reason of the launcher's own; the first reason stays."""
        if self._coordinator is not None:
            self._coordinator.end(stop)
        elif self._ended is None:
            self._ended = stop

    async def close(self) -> None:
        """End what this node started, in order where that is possible."""
        await self._children.close(None if self._coordinator is None else self._coordinator.fleet.welcomed)
        if self._coordinator is not None:
            await self._coordinator.close()

    def kill(self) -> None:
        """End what is left of this world on this node at once."""
        self._children.kill()

    async def fates(self) -> str:
        """Which children were killed, and by which signal."""
        return await self._children.fates()

    def _start_child(self, name: str, module: str, *, dp: int | None = None) -> None:
        holds = self._coordinator is not None
        spec = MemberSpec(
            host=self.host,
            port=self.port,
            token=self.token,
            config=self.config.to_json(),
            dp=-1 if dp is None else dp,
            site=make_site(self.config.parallel, self._dp_ranks, address=self.address, dp=dp),
            essential=holds or dp is not None,
            serves=self._part.serves,
            connect_seconds=CONNECT_SECONDS if holds else JOIN_SECONDS,
        )
        self._children.start(name, module, spec)

    async def _watch_once(self) -> None:
        """Wait a moment; a child that ended although nobody told it to ends the world."""
        await self._wait(WATCH_SECONDS)
        for child in self._children.ended():
            if self.ended is None:
                # Its link tells more than its exit code; give the coordinator a moment to read it.
                await self._wait(HEARSAY_SECONDS)
                joined = self._coordinator is None
                self.end(Stop(child.fate, 0 if joined and child.code == 0 else 1))

    async def _wait(self, seconds: float) -> None:
        if self._coordinator is None:
            await asyncio.sleep(seconds)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._coordinator.ended.wait(), seconds)


def _make_fleet(config: Config) -> Fleet:
    model = load_model_config(Path(config.model.model or ""))
    return Fleet(
        topology=config.parallel.topology,
        agreement=config.agreement(),
        has_workers=config.parallel.distributed_executor_backend != "uni",
        step_timeout_seconds=config.scheduler.step_timeout_seconds,
        placement=placement_digest(config.parallel, model),
        rebalancer=make_rebalancer(config, unix_time=time.time),
    )
