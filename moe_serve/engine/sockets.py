"""An engine's sockets to the front-ends: one thread owns them, since ZMQ sockets must not be shared between threads."""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Callable
from enum import Enum

import msgspec
import zmq

from moe_serve.base.messages import EngineHello, FromEngine, ToEngine

log = logging.getLogger(__name__)


class _Deed(Enum):
    CONNECT = 1
    DISCONNECT = 2


class FrontendSockets:
    """Other methods may be called from any thread; `on_message(frontend address, record)` is, from the owner.

    Each connection opens with `hello`, which carries the world's token; a front-end that was never told to us cannot
    talk to us, since it is the engine that connects.
    """

    def __init__(self, hello: EngineHello, on_message: Callable[[str, ToEngine], None]) -> None:
        self._hello = hello
        self._on_message = on_message
        self._orders: queue.SimpleQueue[tuple[str, FromEngine | _Deed]] = queue.SimpleQueue()
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
        encoder = msgspec.msgpack.Encoder()
        decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
        sockets: dict[str, zmq.Socket[bytes]] = {}
        poller = zmq.Poller()
        poller.register(self._wake_read, zmq.POLLIN)
        while True:
            events = dict(poller.poll())
            if self._wake_read.fileno() in events:
                self._wake_read.recv(4096)
            while not self._orders.empty():
                address, message = self._orders.get()
                if message is _Deed.DISCONNECT:
                    if address in sockets:
                        poller.unregister(sockets[address])
                        sockets.pop(address).close(linger=0)
                    continue
                if address not in sockets:
                    sockets[address] = self._open(context, address, encoder)
                    poller.register(sockets[address], zmq.POLLIN)
                if not isinstance(message, _Deed):
                    sockets[address].send(encoder.encode(message))
            for address, socket_ in sockets.items():
                if socket_ in events:
                    self._receive(address, socket_, decoder)

    def _receive(self, address: str, socket_: zmq.Socket[bytes], decoder: msgspec.msgpack.Decoder[ToEngine]) -> None:
        try:
            message = decoder.decode(socket_.recv())
        except msgspec.MsgspecError as error:
            log.warning("dropped a malformed record from the front-end at %s: %s", address, error)
            return
        self._on_message(address, message)

    def _open(
        self, context: zmq.Context[zmq.Socket[bytes]], address: str, encoder: msgspec.msgpack.Encoder
    ) -> zmq.Socket[bytes]:
        made = context.socket(zmq.DEALER)
        made.setsockopt(zmq.SNDHWM, 0)
        made.setsockopt(zmq.RCVHWM, 0)
        made.connect(address)
        made.send(encoder.encode(self._hello))
        return made
