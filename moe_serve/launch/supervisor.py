"""`moe-serve serve --data-parallel-multi-port-external-lb`: a launcher for each rank of a node, and their supervisor.

Each rank is one of an external load balancer, as if it had been started by itself: a server, a port, a part of the
world. What ends one ends all, and the supervisor with them, or with --restart-world all are started again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence

from moe_serve.api.connections import listen
from moe_serve.api.watching import log_sparingly
from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.model_config import ModelConfig
from moe_serve.base.site import with_port
from moe_serve.launch.endings import MISTAKE, Pauses, code_of_ranks
from moe_serve.launch.part import world_token
from moe_serve.launch.ports import PortPlan, check_ports, port_of_supervisor, ports_of_node
from moe_serve.launch.rank_launchers import RankLaunchers, RankReport
from moe_serve.launch.serve import describe, run_resolved
from moe_serve.launch.site import name_of_this_node
from moe_serve.launch.supervisor_app import make_server, why_not_ready
from moe_serve.world.members import named_ranks

WATCH_SECONDS = 0.1
ASK_SECONDS = 1.0
REMIND_SECONDS = 15.0
OTHERS_SECONDS = 15.0
"""After one rank has ended, for the others to notice it, end their streams and say why."""
LAST_SECONDS = 10.0
"""Beyond --shutdown-timeout, for ranks that drained to end in order."""
END_SECONDS = 3.0
log = logging.getLogger(__name__)


def supervise(config: Config) -> int:
    """Run the ranks of this node until told to stop or broken; the exit code."""

    async def run(resolved: Config, model: ModelConfig) -> int:
        supervisor = Supervisor(resolved, world_token(resolved.parallel))
        log.info("%s", describe(resolved, model))
        return await supervisor.run()

    return run_resolved(config, "supervisor", run)


class Supervisor:
    """Of one node. `config` must be resolved. ConfigError where its ports cannot be had."""

    def __init__(self, config: Config, token: str) -> None:
        self._config = config
        self._parallel = config.parallel
        self._launchers = RankLaunchers(config, token=token, machine=name_of_this_node())
        self._ranks = tuple(self._launchers.ports)
        self._asked = False
        self._told: set[int] = set()
        self._deadline: float | None = None
        self._asking: asyncio.Task[list[RankReport]] | None = None

    async def run(self) -> int:
        """Until the node has ended; the exit code."""
        listening = self._open_ports()
        log_sparingly()
        server = make_server(self._config.server, reports=self._reports, is_stopping=lambda: self._asked)
        self._on_signals()
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        watching = asyncio.create_task(self._run_worlds())
        try:
            await asyncio.wait({serving, watching}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                return watching.result()
            log.error("the supervisor's HTTP server ended: %s", serving.exception() or "without a word")
            return 1
        finally:
            watching.cancel()
            self._launchers.kill()
            server.should_exit = True
            await asyncio.gather(serving, watching, return_exceptions=True)

    def _open_ports(self) -> socket.socket:
        """The supervisor's own, once those of the ranks were seen to be free."""
        check_ports(ports_of_node(self._config, self._ranks))
        for each in self._launchers.ports.values():
            _listen(each).close()  # better known now than when the model is loaded
        return _listen(port_of_supervisor(self._config))

    async def _run_worlds(self) -> int:
        """One world, or with --restart-world one after the other."""
        pauses, worlds = Pauses(), 0
        while True:
            begun = time.monotonic()
            self._deadline, self._told = None, set()
            self._launchers.start(worlds)
            log.info("starting %s, with servers at %s", named_ranks(self._ranks), self._doors())
            code = await self._until_ended()
            if self._asked or code in (0, MISTAKE) or not self._parallel.restart_world:
                return code
            worlds += 1
            pause = pauses.after(time.monotonic() - begun)
            log.info("starting the ranks of this node again in %g s (--restart-world)", pause)
            deadline = time.monotonic() + pause
            while time.monotonic() < deadline:
                await asyncio.sleep(WATCH_SECONDS)
                if self._asked:  # while nothing ran
                    return 0

    async def _until_ended(self) -> int:
        """Until no rank of this node runs; what that means for the node, as an exit code."""
        telling = asyncio.create_task(self._tell_ready())
        try:
            while self._launchers.running() and not self._is_late():
                await asyncio.sleep(WATCH_SECONDS)
                if self._deadline is None and (codes := self._launchers.codes()):
                    self._tell_ends()
                    self._deadline = time.monotonic() + (0 if MISTAKE in codes else OTHERS_SECONDS)
        finally:
            telling.cancel()
        self._tell_ends()
        code = code_of_ranks(self._launchers.codes(), asked=self._asked)
        await self._end_ranks()
        return code

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    async def _end_ranks(self) -> None:
        """Those that still run, and whatever is left of others."""
        if running := self._launchers.running():
            log.warning("ending %s", named_ranks([each.rank for each in running]))
            self._launchers.ask()
            until = time.monotonic() + END_SECONDS
            while self._launchers.running() and time.monotonic() < until:
                await asyncio.sleep(WATCH_SECONDS)
        await asyncio.to_thread(self._launchers.kill)

    def _tell_ends(self) -> None:
        """Each end is a line, once."""
        for each in self._launchers.ended():
            if each.rank not in self._told:
                self._told.add(each.rank)
                log.log(logging.INFO if each.child.code == 0 else logging.ERROR, "%s", each.child.fate)

    async def _tell_ready(self) -> None:
        """Once, when all ranks are; until then now and then who is not."""
        begun = time.monotonic()
        remind = begun + REMIND_SECONDS
        while (reason := why_not_ready(await self._reports())) is not None:
            if time.monotonic() > remind:
                log.info("waiting for %s, %.0f s", reason, time.monotonic() - begun)
                remind += REMIND_SECONDS
            await asyncio.sleep(ASK_SECONDS)
        log.info("%s: ready at %s", named_ranks(self._ranks), self._doors())

    async def _reports(self) -> Sequence[RankReport]:
        """However many ask at a time, the ranks are asked once."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._launchers.reports())
        return await asyncio.shield(self._asking)

    def _doors(self) -> str:
        return ", ".join(with_port(port.host, port.port) for port in self._launchers.ports.values())

    def _on_signals(self) -> None:
        """The first SIGTERM or Ctrl-C drains all ranks, the second of either ends them at once, with its own code."""

        def handle(number: signal.Signals) -> None:
            if self._asked:
                log.warning("%s again: ending at once", number.name)
                self._launchers.kill()
                os._exit(128 + number)
            self._asked = True
            timeout = self._config.server.shutdown_timeout
            self._deadline = time.monotonic() + timeout + LAST_SECONDS
            log.info(
                "%s: %s finish what is in flight (at most %g s, --shutdown-timeout; a second one ends at once)",
                number.name,
                named_ranks(self._ranks),
                timeout,
            )
            self._launchers.ask()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, handle, number)


def _listen(port: PortPlan) -> socket.socket:
    """ConfigError names the port that another service holds, and what chooses it."""
    try:
        return listen(port.host, port.port)
    except ConfigError as error:
        raise ConfigError(
            f"{port.what}, at {with_port(port.host, port.port)}: {error.__cause__} ({port.option})"
        ) from error
