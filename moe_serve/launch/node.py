"""Which processes this node starts, in what order, and how they end.

The launcher holds the coordinator, starts one process per engine and one API server, and waits. Children are told
an address and a token, nothing else: they find each other through the coordinator, also on another machine. They are
not tied to this process either: whoever loses the coordinator ends itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

from moe_serve.base.config import Config
from moe_serve.base.messages import Stop
from moe_serve.eplb.build import make_rebalancer
from moe_serve.world.coordinator import Coordinator
from moe_serve.world.fleet import Fleet
from moe_serve.world.member import MemberSpec, end_all, started_with, threads_per_rank

STOP_SECONDS = 3.0
CONNECT_SECONDS = 1.0
"""The coordinator listens before it starts a child: one that cannot reach it is an orphan."""
WATCH_SECONDS = 0.1
FATE_SECONDS = 0.3
REMIND_SECONDS = 15.0
START_SECONDS = 1800.0
TOKEN_ENVIRONMENT = "MOE_SERVE_WORLD_TOKEN"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Child:
    name: str
    process: subprocess.Popen[bytes]


class Node:
    """The coordinator and the child processes of this node; `config` must be resolved. One event loop owns it."""

    def __init__(self, config: Config, *, serve_http: bool) -> None:
        self.config = config
        self.token = os.environ.get(TOKEN_ENVIRONMENT) or secrets.token_hex(16)
        self.port = 0
        self.children: list[Child] = []
        self._serve_http = serve_http
        parallel = config.parallel
        self.coordinator = Coordinator(
            Fleet(
                token=self.token,
                topology=parallel.topology,
                agreement=config.agreement(),
                has_workers=parallel.distributed_executor_backend != "uni",
                step_timeout_seconds=config.scheduler.step_timeout_seconds,
                rebalancer=make_rebalancer(config, unix_time=time.time),
            )
        )

    @property
    def host(self) -> str:
        return self.config.parallel.data_parallel_master_ip

    @property
    def ended(self) -> Stop | None:
        return self.coordinator.fleet.ended

    async def start(self) -> None:
        """Open the coordinator, then start the children."""
        parallel = self.config.parallel
        self.port = await self.coordinator.start(self.host, parallel.coordinator_port)
        for dp in range(parallel.data_parallel_size):
            self._start_child(f"engine dp {dp}", "moe_serve.engine.process", dp=dp)
        if self._serve_http:
            self._start_child("API server", "moe_serve.api.server")

    async def until_ready(self) -> None:
        """Until every member is ready or the world has ended; who is missing is logged now and then."""
        deadline = time.monotonic() + START_SECONDS
        remind = time.monotonic() + REMIND_SECONDS
        while not (self.coordinator.ready.is_set() or self.coordinator.ended.is_set()):
            await self._watch_once()
            missing = ", ".join(self.coordinator.fleet.missing())
            if time.monotonic() > deadline:
                self.coordinator.end(Stop(f"not ready within {START_SECONDS:g} s; missing: {missing}", 1))
            elif time.monotonic() > remind:
                log.info("still waiting for: %s", missing)
                remind = time.monotonic() + REMIND_SECONDS

    async def until_ended(self) -> Stop:
        """Until the world has ended."""
        while not self.coordinator.ended.is_set():
            await self._watch_once()
        assert self.ended is not None
        return self.ended

    async def close(self) -> None:
        """Give the processes of this world a few seconds to end, then end them. Who has not joined hears nothing."""
        welcomed = self.coordinator.fleet.welcomed
        end_all(pid for pid in started_with(self.token) if (socket.gethostname(), pid) not in welcomed)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and self._is_somebody_left():
            await asyncio.sleep(0.05)
        self.kill()
        await self.coordinator.close()

    def kill(self) -> None:
        """End what is left of this world on this machine at once, workers that have not joined yet included."""
        for child in self.children:
            if child.process.poll() is None:
                child.process.kill()
                child.process.wait()
        end_all(started_with(self.token))

    def _is_somebody_left(self) -> bool:
        return any(child.process.poll() is None for child in self.children) or bool(started_with(self.token))

    def _start_child(self, name: str, module: str, *, dp: int = -1) -> None:
        spec = MemberSpec(
            host=self.host,
            port=self.port,
            token=self.token,
            config=self.config.to_json(),
            dp=dp,
            threads=threads_per_rank(self.config.parallel.world_size_across_dp),
            connect_seconds=CONNECT_SECONDS,
        )
        # A session of its own: Ctrl-C in the terminal reaches the launcher only, which then drains.
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            env=spec.to_environment(),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
        )
        self.children.append(Child(name, process))

    async def _watch_once(self) -> None:
        """Wait a moment; a child that ended although nobody told it to ends the world."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.coordinator.ended.wait(), WATCH_SECONDS)
        for child in self.children:
            code = child.process.poll()
            if code is not None and not self.coordinator.ended.is_set():
                # Its link tells more than its exit code; give the coordinator a moment to read it.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.coordinator.ended.wait(), 0.3)
                self.coordinator.end(Stop(f"{child.name} (pid {child.process.pid}) {_ending(code)}", 1))

    async def fates(self) -> str:
        """Which children were killed, and by which signal; a death is known a moment before its signal."""
        deadline = time.monotonic() + FATE_SECONDS
        while time.monotonic() < deadline and all(child.process.poll() is None for child in self.children):
            await asyncio.sleep(0.02)
        ended = [(child, child.process.poll()) for child in self.children]
        return "; ".join(
            f"{child.name} (pid {child.process.pid}) {_ending(code)}"
            for child, code in ended
            if code is not None and code < 0
        )


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
