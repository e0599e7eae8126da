"""A larger world for LLM: this process is its front-end, everything else is started and held by another one."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import select
import socket
import subprocess
import threading
from collections.abc import Coroutine
from concurrent.futures import Future

import msgspec

from moe_serve.base.config import Config
from moe_serve.base.engine_messages import Generate, TokenEvent
from moe_serve.base.errors import ConfigError, EngineDead, RequestFailed
from moe_serve.base.interpreter import child_environment, module_command
from moe_serve.base.messages import Hello, Ready, Stop, ToMember, WorldReady, WorldView
from moe_serve.base.progress import Progress
from moe_serve.base.site import local_address
from moe_serve.engine.alone import OnEvent
from moe_serve.engine.client import EngineClient
from moe_serve.launch.part import world_token
from moe_serve.launch.world_process import WorldOpened, WorldOrder
from moe_serve.world.link import Link
from moe_serve.world.member import end_all, started

OPEN_SECONDS = 60.0
CLOSE_SECONDS = 10.0


class EngineWorld:
    """The engines of `config` (resolved). Other threads than the caller's may keep this interpreter as long as they
    like: nobody takes that for death."""

    def __init__(self, config: Config) -> None:
        if config.parallel.load_balancing != "internal":
            raise ConfigError(
                f"LLM has no HTTP servers, so {config.parallel.load_balancing} load balancing means nothing to it; "
                "leave out the options that ask for it"
            )
        if config.parallel.is_beside:
            raise ConfigError(
                f"LLM belongs on node 0, which brings the requests; start node {config.parallel.node_rank} by "
                "moe-serve serve with the same options"
            )
        self._token = world_token(config.parallel)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engines", daemon=True)
        self._thread.start()
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._client: EngineClient | None = None
        self._receiving: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] = self._loop.create_future()
        try:
            self._call(self._start(config))
        except BaseException:
            self.close()
            raise

    def run(self, sequences: list[Generate], on_event: OnEvent) -> None:
        """See OneEngine.run."""
        self._call(self._run(sequences, on_event))

    def close(self) -> None:
        """End the world; safe to call twice."""
        if not self._loop.is_running():
            return
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        if not self._loop.is_running():
            self._loop.close()

    async def _start(self, config: Config) -> None:
        opened = await asyncio.to_thread(self._open, config)
        client = self._client = EngineClient(config, token=self._token)
        self._receiving = asyncio.create_task(client.run())
        hello = Hello(
            role="api",
            pid=os.getpid(),
            host=socket.gethostname(),
            address=client.bind(local_address(opened.host, opened.port)),
            patience_seconds=math.inf,  # its owner's code may do what it likes
        )
        link = self._link = await asyncio.to_thread(
            Link,
            opened.host,
            opened.port,
            hello,
            token=self._token,
            on_message=self._hear,
            on_lost=self._lost,
            progress=Progress(),
        )
        if client.data_parallel_size == 0:  # else it has heard of a newer view already
            client.meet(link.view)
        connected = asyncio.create_task(client.wait_ready())
        connected.add_done_callback(lambda _: link.send(Ready()))
        try:
            await self._ready
        finally:
            connected.cancel()

    def _open(self, config: Config) -> WorldOpened:
        """Start the process that holds the world, and hear where its coordinator listens."""
        process = self._process = subprocess.Popen(
            module_command("moe_serve.launch.world_process"),
            env=child_environment(),
            start_new_session=True,  # Ctrl-C is for this process
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        order = WorldOrder(token=self._token, config=config.to_json(), parent=os.getpid())
        with process.stdout as heard:
            with contextlib.suppress(BrokenPipeError), process.stdin as told:
                told.write(msgspec.json.encode(order))
            came, _, _ = select.select([heard], [], [], OPEN_SECONDS)
            line = heard.readline() if came else b""
        if not line:
            how = "has ended" if came else f"has not begun within {OPEN_SECONDS:g} s"
            raise EngineDead(f"the process that holds the world (pid {process.pid}) {how}; its log says more")
        opened = msgspec.json.decode(line, type=WorldOpened)
        if opened.mistake:
            raise ConfigError(opened.mistake)
        return opened

    def _hear(self, message: ToMember) -> None:
        if isinstance(message, Stop):
            self._loop.call_soon_threadsafe(self._fail, message.reason, message.code)
        elif isinstance(message, WorldReady):
            self._loop.call_soon_threadsafe(self._settle, None)
        elif isinstance(message, WorldView) and self._client is not None:
            self._loop.call_soon_threadsafe(self._client.meet, message)

    def _lost(self, why: str) -> None:
        self._loop.call_soon_threadsafe(self._fail, why, 1)

    def _fail(self, why: str, code: int) -> None:
        self._settle(ConfigError(why) if code == 2 else EngineDead(why))
        if self._client is not None:
            self._client.fail(why)

    def _settle(self, error: Exception | None) -> None:
        """Whether the world has become ready is known once."""
        if self._ready.done():
            return
        if error is None:
            self._ready.set_result(None)
        else:
            self._ready.set_exception(error)

    async def _run(self, sequences: list[Generate], on_event: OnEvent) -> None:
        async with asyncio.TaskGroup() as group:
            for sequence in sequences:
                group.create_task(self._stream(sequence, on_event))

    async def _stream(self, sequence: Generate, on_event: OnEvent) -> None:
        assert self._client is not None
        stream = await self._client.submit(sequence.request_id, sequence.token_ids, sequence.sampling)
        try:
            async with contextlib.aclosing(stream) as events:
                async for event in events:
                    if on_event(event):
                        return
        except RequestFailed as error:  # the end of this one; the others go on
            on_event(TokenEvent.of_failure(sequence.request_id, str(error)))

    async def _end(self) -> None:
        process = self._process
        if self._link is not None:
            self._link.close("LLM closed")
        elif process is not None:
            process.terminate()
        if process is not None:
            try:
                await asyncio.to_thread(process.wait, CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                end_all(started(lambda spec: spec.token == self._token))
        if self._receiving is not None:
            self._receiving.cancel()  # before its socket closes, which it would take for a failure of its own
            await asyncio.wait([self._receiving])
        if self._client is not None:
            self._client.close()
        self._ready.cancel()

    def _call(self, work: Coroutine[object, object, None]) -> None:
        """Run in the loop's thread; a group of one failure is that failure."""
        future: Future[None] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            future.result()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        except KeyboardInterrupt:
            future.cancel()
            raise
