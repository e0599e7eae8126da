"""The API server process: joins the world as a front-end, listens for engines and for HTTP, drains, reports.

Started as `python -m moe_serve.api.server` with a MemberSpec in the environment.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from moe_serve.api.app import create_app
from moe_serve.api.balance import CoordinatorBalance
from moe_serve.api.connections import BACKLOG, HttpServer, listen
from moe_serve.api.state import ApiState
from moe_serve.api.throughput import Throughput, report_throughput
from moe_serve.api.watching import log_sparingly
from moe_serve.api.world import CoordinatorWorld
from moe_serve.base.balance_messages import BalanceAnswer
from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError, RankTimeout
from moe_serve.base.log import setup_logging
from moe_serve.base.messages import Drain, Failure, Hello, Ready, Stop, ToMember, WorldReady, WorldView
from moe_serve.base.model_config import load_model_config
from moe_serve.base.progress import Progress
from moe_serve.base.site import naming_http_port, with_port
from moe_serve.base.world_messages import WorldAnswer
from moe_serve.engine.board import NoticeBoard, board_bytes
from moe_serve.engine.client import EngineClient
from moe_serve.text.tokenizer import load_tokenizer
from moe_serve.world.link import Link
from moe_serve.world.member import METRICS_FOLDER, MemberSpec, SharedByServers

FAREWELL_SECONDS = 1.5
LINGER_SECONDS = 1.0
"""After a failure /readyz says 503 for so long, so that who routes requests here can notice."""
POLL_SECONDS = 0.05
log = logging.getLogger("moe_serve.api.server")  # run as __main__, which is no child of moe_serve


class ApiServer:
    """One front-end; everything in it belongs to one event loop but the link's threads."""

    def __init__(self, spec: MemberSpec) -> None:
        self._spec = spec
        self._config = spec.load_config()
        self._board = None if spec.shared is None else open_board(spec.shared, self._config)
        self._engines = EngineClient(self._config, token=spec.token, serves=spec.serves, board=self._board)
        self._state: ApiState | None = None
        self._world_ready = False
        self._orders: asyncio.Queue[Drain | Stop] = asyncio.Queue()
        self._balance = CoordinatorBalance()
        self._world = CoordinatorWorld()

    async def run(self) -> int:
        """Serve until drained, stopped or orphaned; the exit code."""
        loop = asyncio.get_running_loop()

        def hear(message: ToMember) -> None:
            if isinstance(message, Drain | Stop):
                loop.call_soon_threadsafe(self._orders.put_nowait, message)
            elif isinstance(message, BalanceAnswer):
                loop.call_soon_threadsafe(self._balance.hear, message)
            elif isinstance(message, WorldAnswer):
                loop.call_soon_threadsafe(self._world.hear, message)
            elif isinstance(message, WorldView):
                loop.call_soon_threadsafe(self._engines.meet, message)
            elif isinstance(message, WorldReady):
                loop.call_soon_threadsafe(self._be_ready)

        def orphaned(why: str) -> None:
            log.error("%s; this API server ends", why)
            loop.call_soon_threadsafe(self._orders.put_nowait, Stop(why, 1))

        spec = self._spec
        address = self._engines.bind(spec.site.address)
        hello = Hello(
            role="api",
            pid=os.getpid(),
            host=socket.gethostname(),
            address=address,
            agreement=self._config.agreement(),
            node=spec.site.node,
            generation=spec.generation,
            essential=spec.essential,
            serves=spec.serves,
            place=self._place,
            places=self._places,
        )
        link = Link(
            spec.host,
            spec.port,
            hello,
            token=spec.token,
            on_message=hear,
            on_lost=orphaned,
            progress=Progress(),
            connect_seconds=spec.connect_seconds,
        )
        self._engines.meet(link.view)
        self._balance.send = self._world.send = link.send
        try:
            listening = self._listen()
            self._state = state = self._make_state()
            app, alone = create_app(state), self._places == 1
            server = HttpServer(app, state.config.server, state.metrics, alone=alone)
        except ConfigError as error:
            link.send(Failure(str(error), config=True))
            await self._orders.get()
            return 2
        return await self._serve(link, listening, state, server)

    @property
    def _place(self) -> int:
        return 0 if self._spec.shared is None else self._spec.shared.place

    @property
    def _places(self) -> int:
        return 1 if self._spec.shared is None else self._spec.shared.places

    def _listen(self) -> socket.socket:
        """Where the launcher bound; else at a port of its own."""
        server, shared = self._config.server, self._spec.shared
        if shared is None:
            return listen(server.host, server.port)
        made = socket.socket(fileno=shared.listening)
        with naming_http_port(server.host, server.port):  # bound is not yet ours alone
            made.listen(BACKLOG)
        return made

    def _be_ready(self) -> None:
        self._world_ready = True
        if self._state is not None:
            self._state.starting = False

    def _make_state(self) -> ApiState:
        folder = Path(self._config.model.model or "")
        model_config, tokenizer = load_model_config(folder), load_tokenizer(self._config)
        tokenizer.chat_templates.check()
        return ApiState(
            config=self._config,
            model_name=self._config.model.served_model_name or str(folder),
            tokenizer=tokenizer,
            engines=self._engines,
            generation_defaults=model_config.generation_defaults,
            created=int(time.time()),
            vocab_size=model_config.vocab_size,
            balance=self._balance,
            world=self._world,
            starting=not self._world_ready,
            board=self._board,
            metrics_folder=os.environ.get(METRICS_FOLDER) if self._places > 1 else None,
        )

    async def _serve(self, link: Link, listening: socket.socket, state: ApiState, server: HttpServer) -> int:
        log_sparingly()
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        throughput = Throughput(state.metrics, lambda: self._engines.reports, lambda: state.admission.num_waiting)
        tasks = {
            "receiving from engines": asyncio.create_task(self._engines.run()),
            "the announcement": asyncio.create_task(self._announce(link, listening)),
        }
        if self._place == 0:  # it speaks for all of them
            tasks["reports of throughput"] = asyncio.create_task(report_throughput(throughput))
        order = await self._until_ordered(serving, tasks)
        if isinstance(order, Drain):
            order = await self._drain(order, state)
        code = await self._end(order)
        link.close(order.reason)
        for task in tasks.values():
            task.cancel()
        server.should_exit = True
        state.conversations.close()
        await asyncio.gather(serving, *tasks.values(), return_exceptions=True)
        self._engines.close()
        state.metrics.close()
        return code

    async def _until_ordered(
        self, serving: asyncio.Task[None], tasks: Mapping[str, asyncio.Task[None]]
    ) -> Stop | Drain:
        """Until somebody says how this ends, or one of the `tasks` fails: none of them ends unnoticed."""
        ordered = asyncio.create_task(self._orders.get())
        running = {serving, *tasks.values()}
        while True:
            done, _ = await asyncio.wait({ordered, *running}, return_when=asyncio.FIRST_COMPLETED)
            if ordered in done:
                return ordered.result()
            for name, task in {"the HTTP server": serving, **tasks}.items():
                if task.done() and (error := task.exception()) is not None:
                    log.error("%s failed", name, exc_info=error)
                    return Stop(f"the API server failed: {name}: {type(error).__name__}: {error}", 1)
            if serving in done:
                return Stop("the API server was asked to end", 0)
            running -= done  # what was to be done once is done

    async def _announce(self, link: Link, listening: socket.socket) -> None:
        await self._engines.wait_ready()
        host, port = listening.getsockname()[:2]
        link.send(Ready(with_port(host, port)))

    async def _drain(self, order: Drain, state: ApiState) -> Stop:
        """No new requests; those in flight get their time, which the coordinator ends with a Stop."""
        state.start_draining()
        log.info("draining: %d answers in flight, at most %g s", self._engines.num_unfinished, order.timeout)
        while self._engines.num_unfinished:
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    newer = await self._orders.get()
            except TimeoutError:
                continue
            if isinstance(newer, Stop):
                return newer
        return Stop("drained", 0)

    async def _end(self, order: Stop) -> int:
        """End open streams with an error event and give them a moment to be written."""
        served, started = self._engines.ready, time.monotonic()
        self._engines.fail(order.reason if order.code else "the server is shutting down")
        await asyncio.sleep(LINGER_SECONDS if order.code and served else POLL_SECONDS)
        while self._engines.num_unfinished and time.monotonic() - started < FAREWELL_SECONDS:
            await asyncio.sleep(POLL_SECONDS)
        return order.code


def open_board(shared: SharedByServers, config: Config) -> NoticeBoard:
    """The memory that the launcher made for its API servers."""
    ranks = config.parallel.data_parallel_size
    memory = mmap.mmap(shared.board, board_bytes(shared.places, ranks))
    os.close(shared.board)
    return NoticeBoard(memoryview(memory), num_slots=shared.places, slot=shared.place, num_ranks=ranks)


def main() -> int:
    spec = MemberSpec.from_environment()
    several = spec.shared is not None and spec.shared.places > 1
    who = f"api {spec.shared.place}" if spec.shared is not None and several else "api"
    setup_logging(who, spec.load_config().server.log_level)
    try:
        return asyncio.run(ApiServer(spec).run())
    except (ConfigError, RankTimeout) as error:
        log.error("%s", error)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
