"""An engine's sockets to the front-ends: one thread owns them, since ZMQ sockets must not be shared between threads."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from moe_serve.base.engine_messages import EngineHello, FromEngine, ToEngine
from moe_serve.base.messages import UNREADABLE
from moe_serve.base.sockets import QUEUED_MESSAGES, prepare

PATIENCE_SECONDS = 5.0
log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ToEngine).decode


class _Deed(Enum):
    CONNECT = 1
    DISCONNECT = 2


@dataclass(frozen=True, slots=True)
class LineLost:
    """The connection to a front-end broke, and what was on its way is gone. `final`: it has not come back either."""

    final: bool = False


@dataclass(frozen=True, slots=True)
class LineStands:
    """There is a connection to a front-end, and both ends have proved the token."""


@dataclass(slots=True)
class _Line:
    """To one front-end; `monitor` tells whether its connection stands. `deadline` for it to come back."""

    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    deadline: float | None = None
    stood: bool = False

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=0)


class FrontendSockets:
    """Other methods may be called from any thread; `on_message(frontend address, record)` is, from the owner.

    Each connection opens with `hello`; the world's `token` proves it (base/sockets.py). After one that was lost a new
    one is opened, whose hello tells the front-end that something was; the owner hears LineLost, and hears it again if
    the front-end cannot be reached within `patience` seconds. It hears LineStands of each connection.
    """

    def __init__(
        self,
        hello: EngineHello,
        on_message: Callable[[str, ToEngine | LineLost | LineStands], None],
        *,
        token: str,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._hello = _encode(hello)
        self._token = token
        self._patience = patience
        self._on_message = on_message
        self._orders: queue.SimpleQueue[tuple[str, FromEngine | _Deed]] = queue.SimpleQueue()
        self._lines: dict[str, _Line] = {}
        self._poller = zmq.Poller()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        threading.Thread(target=self._run, name="frontends", daemon=True).start()

    def connect(self, address: str) -> None:
        """Connect to a front-end; connecting twice is fine."""
        self._order(address, _Deed.CONNECT)

    def disconnect(self, address: str) -> None:
        """Give up a front-end that is gone; what was not delivered is lost."""
        self._order(address, _Deed.DISCONNECT)

    def send(self, address: str, message: FromEngine) -> None:
        """Queue a record for a front-end."""
        self._order(address, message)

    def _order(self, address: str, message: FromEngine | _Deed) -> None:
        self._orders.put((address, message))
        try:
            self._wake_write.send(b"\0")
        except BlockingIOError:
            return  # the thread has unread wake-ups already

    def _run(self) -> None:
        context = zmq.Context()
        self._poller.register(self._wake_read, zmq.POLLIN)
        while True:
            events = dict(self._poller.poll(self._milliseconds()))
            if self._wake_read.fileno() in events:
                self._wake_read.recv(4096)
            while not self._orders.empty():
                self._carry_out(context, *self._orders.get())
            for address, line in list(self._lines.items()):
                if line.socket in events:
                    self._receive(address, line)
                if line.monitor in events:
                    self._watch(context, address, line)
                if line.deadline is not None and time.monotonic() > line.deadline:
                    line.deadline = None
                    self._on_message(address, LineLost(final=True))

    def _milliseconds(self) -> int | None:
        """Until the next deadline of a line that is down."""
        deadlines = [line.deadline for line in self._lines.values() if line.deadline is not None]
        return max(0, int((min(deadlines) - time.monotonic()) * 1000) + 1) if deadlines else None

    def _carry_out(self, context: zmq.Context[zmq.Socket[bytes]], address: str, message: FromEngine | _Deed) -> None:
        if message is _Deed.DISCONNECT:
            self._close(address)
            return
        if address not in self._lines:
            self._lines[address] = self._open(context, address)
        if not isinstance(message, _Deed):
            try:
                self._lines[address].socket.send(_encode(message), zmq.NOBLOCK)
            except zmq.Again:
                log.error("the front-end at %s has left %d messages unread", address, QUEUED_MESSAGES)
                self._reopen(context, address)

    def _receive(self, address: str, line: _Line) -> None:
        try:
            message = _decode(line.socket.recv())
        except UNREADABLE as error:
            log.warning("dropped a malformed record from the front-end at %s: %s", address, error)
            return
        self._on_message(address, message)

    def _watch(self, context: zmq.Context[zmq.Socket[bytes]], address: str, line: _Line) -> None:
        if recv_monitor_message(line.monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            line.stood, line.deadline = True, None
            self._on_message(address, LineStands())
        elif line.stood:
            log.error("the connection to the front-end at %s is lost; its requests here are given up", address)
            self._reopen(context, address)

    def _reopen(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        """A socket of its own for a new connection: what is queued in the old one must not follow a gap."""
        self._close(address)
        self._lines[address] = line = self._open(context, address)
        line.deadline = time.monotonic() + self._patience
        self._on_message(address, LineLost())

    def _open(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> _Line:
        made = prepare(context.socket(zmq.DEALER), self._token, listens=False)
        line = _Line(made, made.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED))
        self._poller.register(line.socket, zmq.POLLIN)
        self._poller.register(line.monitor, zmq.POLLIN)
        made.connect(address)
        made.send(self._hello)
        return line

    def _close(self, address: str) -> None:
        line = self._lines.pop(address, None)
        if line is not None:
            self._poller.unregister(line.socket)
            self._poller.unregister(line.monitor)
            line.close()
