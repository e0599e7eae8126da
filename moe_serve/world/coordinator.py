"""The sockets and the clock around world.fleet: a TCP server for the links of all members."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial

import msgspec

from moe_serve.base.errors import ConfigError
from moe_serve.base.messages import FromMember, Stop, ToMember
from moe_serve.base.parcel import Parcel
from moe_serve.base.site import with_port
from moe_serve.base.world_messages import WorldAsk
from moe_serve.eplb.questions import RequestQuestion, Solved
from moe_serve.world.door import Door
from moe_serve.world.fleet import Fleet
from moe_serve.world.link import HEADER, MAX_FRAME, frame
from moe_serve.world.outbox import MAX_WAITING_BYTES, Outbox, Turns
from moe_serve.world.parcels import Send
from moe_serve.world.solver import SOLVE_SECONDS, Solver
from moe_serve.world.status import answer_ask

OPTIONS = "options --data-parallel-address and --data-parallel-rpc-port"
TICK_SECONDS = 0.5
BIND_TRIES = 5
BACKLOG = 4096
"""Connections that the kernel may hold until they are taken: thousands come in one moment (net.core.somaxconn counts
too), and whoever is not held waits for a second and longer before he tries again."""
HELLO_SECONDS = 10.0
CLOSE_SECONDS = 1.0
log = logging.getLogger(__name__)
_from_member: msgspec.msgpack.Decoder[FromMember] = msgspec.msgpack.Decoder(FromMember)


class Coordinator:
    """`start()`, then wait on `ready` and `ended`. All methods belong to one event loop.

    Who does not know the `token` is not listened to (door.py).

    What is to be decided is worked out by solvers: one for decisions, one for requests, so that neither waits for the
    other. Every task has an owner: one that ends although nobody asked it to ends the world, and says why.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        token: str,
        solve_seconds: float = SOLVE_SECONDS,
        outbox_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        self.fleet = fleet
        self._door = Door(token)
        self.ready = asyncio.Event()
        self.ended = asyncio.Event()
        self._outboxes: dict[int, Outbox] = {}
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._outbox_bytes = outbox_bytes
        self._turns = Turns()
        early = fleet.rebalancer is not None  # they are there before the first question, while engines load
        self._decisions = Solver(self._hear_solved, limit=solve_seconds, early=early)
        self._answers = Solver(self._hear_solved, limit=solve_seconds, early=early)
        self._ids = itertools.count()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    async def start(self, host: str, port: int, *, options: str = OPTIONS) -> int:
        """Listen on `host` only; the port in use. A taken port is tried five times, then a ConfigError that names the
        `options` for them."""
        for attempt in range(BIND_TRIES):
            try:
                self._server = await asyncio.start_server(self._serve, host, port, backlog=BACKLOG)
                break
            except OSError as error:
                if port == 0 or attempt == BIND_TRIES - 1:
                    raise ConfigError(
                        f"the coordinator cannot listen on {with_port(host, port)}: {error.strerror or error} "
                        f"({options})"
                    ) from error
                await asyncio.sleep(0.5)
        assert self._server is not None
        self._own(self._tick(), "the watch over silence")
        self._own(self._turns.run(), "the turns of the lines")
        self._own(self._decisions.run(), "the solver of decisions")
        self._own(self._answers.run(), "the solver of requests")
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    def end(self, stop: Stop) -> None:
        """End the world for a reason of the launcher's own."""
        self._act(lambda: self.fleet.end(stop))

    def drain(self, timeout: float) -> None:
        """Finish what is in flight within `timeout` seconds, then end."""
        self._act(lambda: self.fleet.drain(timeout, time.monotonic(), node=self.fleet.node))

    async def close(self) -> None:
        """Stop listening and drop all lines."""
        self._closing = True
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers.values()):
            writer.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._act(lambda: self.fleet.tick(time.monotonic()))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            known = await self._door.admit(reader, writer)
        except asyncio.CancelledError:
            return
        if not known:
            await _close(writer)
            return
        member = next(self._ids)
        outbox = Outbox(writer, self._turns, limit=self._outbox_bytes)
        self._writers[member], self._outboxes[member] = writer, outbox
        writing = self._own(_write(outbox), f"the writing to member {member}")
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                message = await _receive(reader)
            while message is not None:
                self._hear(member, message, time.monotonic())
                message = await _receive(reader)
        except asyncio.CancelledError:
            return  # the loop ends; asyncio would report a cancelled handler as an error
        except Exception as error:  # noqa: BLE001 (whatever a stranger sends ends his own connection)
            who = self.fleet.members.get(member)
            if self.fleet.ended is None and not (who is not None and who.leaving):
                why = f"{type(error).__name__}: {error}"
                log.warning("dropped a connection from %s: %s", writer.get_extra_info("peername"), why)
        finally:
            del self._writers[member], self._outboxes[member]
            self._act(lambda: self.fleet.lost(member, time.monotonic()))
            writing.cancel()
            await _close(writer)

    def _hear(self, member: int, message: FromMember, now: float) -> None:
        if isinstance(message, WorldAsk):
            self._act(partial(answer_ask, self.fleet, member, message, now))
        else:
            self._act(partial(self.fleet.hear, member, message, now))

    def _hear_solved(self, solved: Solved) -> None:
        self._act(lambda: self.fleet.hear_solved(solved, time.monotonic()))

    def _own(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(partial(self._task_ended, name))
        return task

    def _task_ended(self, name: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not (task.cancelled() or self._closing):
            error = task.exception()
            self._fail(f"{name} ended: {_named(error) if error is not None else 'without a reason'}", error)

    def _act(self, step: Callable[[], list[Send]]) -> None:
        """A step of the state machine, and what follows. Its own exceptions are nobody else's death."""
        try:
            self._follow(step())
        except Exception as error:  # noqa: BLE001 (our own bug, whatever it is, must be named)
            self._fail(_named(error), error)

    def _fail(self, why: str, error: BaseException | None) -> None:
        log.error("the coordinator failed: %s", why, exc_info=error)
        self._send(self.fleet.end(Stop(f"the coordinator failed: {why}", 1)))
        self.ended.set()

    def _follow(self, sends: list[Send]) -> None:
        self._send(sends)
        for line in self.fleet.take_log():
            log.warning("%s", line)
        if self.fleet.rebalancer is not None:
            for line in self.fleet.rebalancer.take_log():
                log.info("%s", line)
        for question in self.fleet.take_questions():
            if isinstance(question, RequestQuestion):
                self._answers.ask(question)
            else:
                self._decisions.ask(question, alone=True)
        if self.fleet.ready:
            self.ready.set()
        if self.fleet.ended is not None:
            self.ended.set()

    def _send(self, sends: list[Send]) -> None:
        frames: dict[int, Parcel] = {}  # many members are told the same
        for send in sends:
            outbox = self._outboxes.get(send.member)
            if outbox is None:
                continue
            key = id(send.message)
            if key not in frames:
                frames[key] = _framed(send.message)
            outbox.put(frames[key], urgent=isinstance(send.message, Stop), close=send.close)
            if outbox.is_full:
                self._send(self.fleet.choked(send.member, outbox.waiting_bytes))


async def _close(writer: asyncio.StreamWriter) -> None:
    """Hears how the connection ended too: asyncio would print what nobody has heard when it collects garbage."""
    writer.close()
    with contextlib.suppress(OSError, TimeoutError, asyncio.CancelledError):
        async with asyncio.timeout(CLOSE_SECONDS):
            await writer.wait_closed()


async def _write(outbox: Outbox) -> None:
    try:
        await outbox.run()
    except OSError:
        return  # whoever reads from this connection says so


def _framed(message: ToMember | Parcel) -> Parcel:
    if isinstance(message, Parcel):
        return Parcel((HEADER.pack(len(message)), *message.pieces))
    return Parcel((frame(message),))


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


async def _receive(reader: asyncio.StreamReader) -> FromMember | None:
    try:
        (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
        if length > MAX_FRAME:
            return None
        return _from_member.decode(await reader.readexactly(length))
    except asyncio.IncompleteReadError:
        return None
