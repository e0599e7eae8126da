"""Which processes this node starts, in what order, and how they end.

A launcher starts one process per engine of its own and, where asked to, API servers; one of the launchers of a
world holds the coordinator. Children are told an address and a token, and find each other through the coordinator,
also on another machine; only the API servers of one launcher have more in common (shared.py). They are not tied to
this process either: whoever loses the coordinator ends itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from moe_serve.base.config import Config
from moe_serve.base.descriptors import raise_descriptor_limit
from moe_serve.base.errors import ConfigError
from moe_serve.base.messages import Stop
from moe_serve.base.model_config import load_model_config
from moe_serve.base.registry import import_target
from moe_serve.base.secret import check_token
from moe_serve.base.site import local_address, resolve_host, with_port
from moe_serve.eplb.build import make_rebalancer
from moe_serve.eplb.first_placement import check_placement, placement_digest
from moe_serve.launch.children import Children
from moe_serve.launch.meeting_place import MeetingPlace
from moe_serve.launch.node_workers import start_node_workers
from moe_serve.launch.part import NodePart, world_token
from moe_serve.launch.shared import SharedThings
from moe_serve.launch.site import make_site, name_of_this_node
from moe_serve.launch.uplink import Uplink
from moe_serve.world.coordinator import Coordinator
from moe_serve.world.fleet import Fleet
from moe_serve.world.member import MemberSpec, SharedByServers
from moe_serve.world.members import named_ranks
from moe_serve.world.places import absent_nodes

CONNECT_SECONDS = 5.0
"""The coordinator listens before a child is started: one that cannot reach it is an orphan."""
GENERATION_BITS = 48
WATCH_SECONDS = 0.1
HEARSAY_SECONDS = 0.3
REMIND_SECONDS = 15.0
log = logging.getLogger(__name__)


class Node:
    """The children of one machine and, unless it joins, the coordinator. `config` must be resolved.

    One event loop owns it. `token` of the world; from the environment, a file, or a new one, if not given. `worlds` in
    which this launcher has been before.
    """

    def __init__(self, config: Config, part: NodePart, *, token: str = "", worlds: int = 0) -> None:
        self.config = config
        self.token = check_token(token) if token else world_token(config.parallel)
        self._place = MeetingPlace.of(config.parallel)
        self.host, self.port = self._place.host, self._place.port
        self.name = name_of_this_node()
        self._part = part
        dp_size = config.parallel.data_parallel_size
        self._dp_ranks = tuple(range(dp_size)) if part.dp_ranks is None else part.dp_ranks
        self._worlds = worlds
        self._has_workers = False
        self._children = Children(token=self.token, node=self.name)
        self._ray_engines: Any = None
        self._shared: SharedThings | None = None
        self._coordinator: Coordinator | None = None
        self._uplink: Uplink | None = None
        self._ended: Stop | None = None
        self.asked_to_stop = False

    @property
    def ended(self) -> Stop | None:
        """Why the world has ended, as far as this node can know."""
        if self._coordinator is not None:
            return self._coordinator.fleet.ended
        return self._ended if self._uplink is None else self._uplink.stop

    @property
    def address(self) -> str:
        """This machine's own, on the way to the coordinator."""
        return local_address(self.host, self.port)

    @property
    def world_number(self) -> int:
        """Which of its deployment's worlds this is, from 1; 0 before it has one."""
        if self._coordinator is not None:
            return self._coordinator.fleet.number
        return 0 if self._uplink is None else self._uplink.number

    async def start(self) -> None:
        """Open the coordinator or find it, then start the children. ConfigError if that cannot be."""
        raise_descriptor_limit()  # a line to every member of the world; engines have one to each other in each group
        if self._part.serve_http:
            self._shared = SharedThings(self.config)
        await self._until_resolved()
        if self.config.parallel.data_parallel_backend == "ray" and self._ended is None:
            await self._place_on_ray()
        if self._ended is not None:
            return
        if self._part.joins:
            node_rank = self._part.node_rank
            self._uplink = Uplink(
                self.config, self._dp_ranks, token=self.token, worlds=self._worlds, node_rank=node_rank
            )
            await self._uplink.join()
            if node_rank:
                self._check_placement(self._uplink.placement)
        else:
            fleet = _make_fleet(self.config, node=self.name, ranks_here=self._dp_ranks, number=self._worlds + 1)
            self._coordinator = Coordinator(fleet, token=self.token)
            self.port = await self._coordinator.start(self.host, self.port, options=self._place.options)
        if self.ended is not None:
            return
        for dp in self._dp_ranks:
            self._start_child(f"engine dp {dp}", "moe_serve.engine.process", dp=dp)
        if self._shared is not None:
            for place in range(self._shared.count):
                name = "API server" if self._shared.count == 1 else f"API server {place}"
                self._start_child(name, "moe_serve.api.server", place=place)
            self._shared.let_go()

    async def _place_on_ray(self) -> None:
        """Ray is imported only where it is asked for."""
        made: Any = import_target("moe_serve.launch.ray_engines:RayEngines", "data-parallel backend", "ray")
        self._ray_engines = made(self.config)
        self.config = await asyncio.to_thread(self._ray_engines.prepare)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):  # Ray has put itself before, to print a stack
                signal.signal(number, signal.getsignal(number))

    async def _until_resolved(self) -> None:
        """In a cluster that name may be there later than we are; one machine has its names from the start."""
        begun = time.monotonic()
        limit = self.config.parallel.start_timeout_seconds if self.config.parallel.is_apart else 0.0
        remind = begun + REMIND_SECONDS
        while self._ended is None:
            try:
                await asyncio.to_thread(resolve_host, self.host, self.port)
                return
            except ConfigError as error:
                waited = time.monotonic() - begun
                if waited >= limit:
                    tried = f", for {waited:.0f} s" if limit else ""
                    raise ConfigError(f"{error}{tried} (option {self._place.host_option})") from error
                if time.monotonic() > remind:
                    log.info("waiting for the name of %s, %.0f s: %s", self._place.first, waited, error)
                    remind += REMIND_SECONDS
            await asyncio.sleep(0.5)

    async def until_ready(self) -> None:
        """Until every member is ready or the world has ended; who is missing is logged now and then."""
        begun = time.monotonic()
        limit = self.config.parallel.start_timeout_seconds
        remind = begun + REMIND_SECONDS
        while not self._is_ready and self.ended is None:
            await self._watch_once()
            waited = time.monotonic() - begun
            if waited > limit and self._coordinator is not None:
                self.end(Stop(f"not ready within {limit:g} s (--start-timeout-seconds); missing: {self._awaited()}", 1))
            elif time.monotonic() > remind:
                log.info("waiting for %s, %.0f s", self._awaited(), waited)
                remind += REMIND_SECONDS

    @property
    def _is_ready(self) -> bool:
        world = self._coordinator or self._uplink
        return world is not None and world.ready.is_set()

    def _awaited(self) -> str:
        """For people: `ranks 1, 3 at HOST:PORT` whose launchers have not come; else who is not ready."""
        if self._coordinator is None:
            return f"the others of the world of {self._place.first} at {self._place.where}"
        fleet = self._coordinator.fleet
        if nodes := absent_nodes(fleet.members.values(), fleet.topology):
            return f"{nodes} at {self._place.where}"
        here = {*self._dp_ranks, *(rank for each in fleet.members.values() for rank in each.hello.ranks)}
        away = [rank for rank in range(fleet.topology.dp) if rank not in here]
        return f"{named_ranks(away)} at {with_port(self.host, self.port)}" if away else ", ".join(fleet.missing())

    async def until_ended(self) -> Stop:
        """Until the world has ended."""
        while self.ended is None:
            await self._watch_once()
        return self.ended

    def front_door(self) -> str:
        """Where this node's API server says it listens, as host:port; "" where it has none."""
        if self._coordinator is not None:
            return self._coordinator.fleet.front_door(self.name)
        return "" if self._uplink is None else self._uplink.front_door

    def drain(self, timeout: float) -> None:
        """Finish what is in flight here, then end the world: no step can be done without this node."""
        self.asked_to_stop = True
        if self._coordinator is not None:
            self._coordinator.drain(timeout)
        elif self._uplink is not None and self._uplink.ready.is_set():
            self._uplink.retire(timeout)
        else:
            self.end(Stop("asked to stop before the world was ready", 0, self.name))

    def end(self, stop: Stop) -> None:
        """End for a reason of the launcher's own; the first reason stays."""
        if self._coordinator is not None:
            self._coordinator.end(stop)
        elif self._uplink is not None:
            self._uplink.end(stop)
        elif self._ended is None:
            self._ended = stop

    async def close(self) -> None:
        """End what this node started, in order where that is possible."""
        if self._uplink is not None:
            self._uplink.close("" if self.ended is None else self.ended.reason)
        await self._children.close(None if self._coordinator is None else self._coordinator.fleet.welcomed)
        if self._coordinator is not None:
            await self._coordinator.close()
        if self._ray_engines is not None:
            await asyncio.to_thread(self._ray_engines.close)
        if self._shared is not None:
            self._shared.close()

    def kill(self) -> None:
        """End what is left of this world on this node at once."""
        self._children.kill()
        if self._ray_engines is not None:
            self._ray_engines.close()

    async def fates(self) -> str:
        """Which children were killed, and by which signal."""
        return await self._children.fates()

    @property
    def _generation(self) -> int:
        if self._coordinator is not None:
            return self._coordinator.fleet.generation
        return 0 if self._uplink is None else self._uplink.generation

    def _check_placement(self, expected: str) -> None:
        """Engines check theirs by themselves; workers take their engine's word, but read a file of their own."""
        try:
            check_placement(expected, self.config.parallel, load_model_config(Path(self.config.model.model or "")))
        except ConfigError as error:
            self.end(Stop(str(error), 2, self.name))
            raise

    def _start_workers(self) -> None:
        """Those of this node for the engine on node 0, once, as soon as that listens."""
        if self._has_workers or self._uplink is None or not self._uplink.engine_address:
            return
        self._has_workers = True
        start_node_workers(
            self._children,
            self.config,
            self._spec(0),
            node=self._part.node_rank,
            engine_address=self._uplink.engine_address,
        )

    def _start_child(self, name: str, module: str, *, dp: int | None = None, place: int = 0) -> None:
        shared = self._shared if dp is None else None
        spec = self._spec(dp, None if shared is None else shared.of(place))
        if dp is None or self._ray_engines is None:
            self._children.start(name, module, spec, shared)
        else:
            self._children.add(self._ray_engines.start(name, spec))

    def _spec(self, dp: int | None, shared: SharedByServers | None = None) -> MemberSpec:
        own = dp if dp in self._dp_ranks else None
        return MemberSpec(
            host=self.host,
            port=self.port,
            token=self.token,
            config=self.config.to_json(keys=dp is None),
            dp=-1 if dp is None else dp,
            site=make_site(self.config.parallel, self._dp_ranks, address=self.address, dp=own, part=self._part),
            essential=bool(self._dp_ranks),  # more front-ends may come and go
            serves=self._part.serves,
            generation=self._generation,
            connect_seconds=CONNECT_SECONDS,
            shared=shared,
        )

    async def _watch_once(self) -> None:
        """Wait a moment; a child that ended although nobody told it to ends the world."""
        await self._wait(WATCH_SECONDS)
        if self.ended is None:
            self._start_workers()
        for child in self._children.ended():
            if self.ended is None and not (self.asked_to_stop and child.code == 0):  # whoever has drained may go first
                # Its link tells more than its exit code; give the coordinator a moment to read it.
                await self._wait(HEARSAY_SECONDS)
                self.end(Stop(child.fate, 1, self.name))

    async def _wait(self, seconds: float) -> None:
        world = self._coordinator or self._uplink
        assert world is not None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(world.ended.wait(), seconds)


def _make_fleet(config: Config, *, node: str, ranks_here: Collection[int], number: int) -> Fleet:
    model = load_model_config(Path(config.model.model or ""))
    return Fleet(
        topology=config.parallel.topology,
        agreement=config.agreement(),
        has_workers=config.parallel.distributed_executor_backend != "uni",
        step_timeout_seconds=config.scheduler.step_timeout_seconds,
        num_frontends=config.parallel.num_frontends,
        generation=secrets.randbits(GENERATION_BITS),
        number=number,
        node=node,
        ranks_here=ranks_here,
        placement=placement_digest(config.parallel, model),
        rebalancer=make_rebalancer(config, unix_time=time.time),
    )
