"""The sockets and the clock around world.fleet: a TCP server for the links of all members."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time

import msgspec

from moe_serve.base.errors import ConfigError
from moe_serve.base.messages import FromMember, Stop
from moe_serve.world.fleet import Fleet, Send
from moe_serve.world.link import HEADER, MAX_FRAME, frame

TICK_SECONDS = 0.5
BIND_TRIES = 5
HELLO_SECONDS = 10.0
log = logging.getLogger(__name__)
_from_member: msgspec.msgpack.Decoder[FromMember] = msgspec.msgpack.Decoder(FromMember)


class Coordinator:
    """`start()`, then wait on `ready` and `ended`. All methods belong to one event loop."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._ids = itertools.count()
        self._server: asyncio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen on `host` only; the port in use. A taken port is tried five times, then a ConfigError."""
        for attempt in range(BIND_TRIES):
            try:
                self._server = await asyncio.start_server(self._serve, host, port)
                break
            except OSError as error:
                if port == 0 or attempt == BIND_TRIES - 1:
                    raise ConfigError(
                        f"the coordinator cannot listen on {host}:{port}: {error.strerror or error} "
                        "(options --data-parallel-master-ip and --data-parallel-rpc-port)"
                    ) from error
                await asyncio.sleep(0.5)
        assert self._server is not None
        self._ticker = asyncio.create_task(self._tick())
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    def end(self, stop: Stop) -> None:
        """End the world for a reason of the launcher's own."""
        self._send(self.fleet.end(stop))

    def drain(self, timeout: float) -> None:
        """Finish what is in flight within `timeout` seconds, then end."""
        self._send(self.fleet.drain(timeout, time.monotonic()))

    async def close(self) -> None:
        """Stop listening and drop all lines."""
        if self._ticker is not None:
            self._ticker.cancel()
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers.values()):
            writer.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._send(self.fleet.tick(time.monotonic()))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        member = next(self._ids)
        self._writers[member] = writer
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                message = await _receive(reader)
            while message is not None:
                self._send(self.fleet.hear(member, message, time.monotonic()))
                message = await _receive(reader)
        except (OSError, TimeoutError, msgspec.MsgspecError) as error:
            if self.fleet.ended is None:
                log.warning("dropped a connection from %s: %s", writer.get_extra_info("peername"), error)
        except asyncio.CancelledError:
            return  # the loop ends; asyncio would report a cancelled handler as an error
        finally:
            self._writers.pop(member, None)
            self._send(self.fleet.lost(member, time.monotonic()))
            writer.close()

    def _send(self, sends: list[Send]) -> None:
        for send in sends:
            writer = self._writers.get(send.member)
            if writer is not None and not writer.is_closing():
                with contextlib.suppress(OSError, RuntimeError):
                    writer.write(frame(send.message))
                    if send.close:
                        writer.close()
        for line in self.fleet.take_log():
            log.warning("%s", line)
        if self.fleet.rebalancer is not None:
            for line in self.fleet.rebalancer.take_log():
                log.info("%s", line)
        if self.fleet.ready:
            self.ready.set()
        if self.fleet.ended is not None:
            self.ended.set()


async def _receive(reader: asyncio.StreamReader) -> FromMember | None:
    try:
        (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
        if length > MAX_FRAME:
            return None
        return _from_member.decode(await reader.readexactly(length))
    except asyncio.IncompleteReadError:
        return None
