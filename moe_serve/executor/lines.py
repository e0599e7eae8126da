"""The lines between an engine and its workers: who may come in, orders out, replies in. Knows nothing of what they say.

The engine listens and workers come by address and token, so it is all the same who started them and where.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Sequence

import zmq
from zmq.utils.monitor import recv_monitor_message

from moe_serve.base.messages import UNREADABLE
from moe_serve.base.site import with_port
from moe_serve.base.sockets import prepare
from moe_serve.executor.seats import Seat
from moe_serve.worker import wire

log = logging.getLogger(__name__)


class WorkerLines:
    """send() may be called in any thread. First listen, then admit, then the rest."""

    def __init__(self, token: str) -> None:
        self._context = zmq.Context()
        orders, replies = self._context.socket(zmq.ROUTER), self._context.socket(zmq.PULL)
        self._orders = prepare(orders, token, listens=True, max_bytes=wire.MAX_JOIN_BYTES)
        self._replies = prepare(replies, token, listens=True, max_bytes=wire.MAX_REPLY_BYTES)
        self._lock = threading.Lock()
        self._monitor: zmq.Socket[bytes] | None = None
        self._closing, self._wake = socket.socketpair()

    def listen(self, host: str) -> tuple[str, int]:
        """Bind both sockets to this address of ours: where to come, and the port for replies."""
        self._orders.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._orders.setsockopt(zmq.RCVHWM, 8)  # who comes after all seats are taken is not listened to
        doors = []
        for each in (self._orders, self._replies):
            each.bind(f"tcp://{with_port(host, 0)}")
            doors.append(each.get_string(zmq.LAST_ENDPOINT).rstrip("\0"))
        return doors[0], int(doors[1].rpartition(":")[2])

    def admit(self, seats: Sequence[Seat], welcome: bytes, milliseconds: int) -> None:
        """Wait so long for somebody to come; seat a worker whose place is free."""
        if not self._orders.poll(milliseconds):
            return
        first, second, *_ = self._orders.recv_multipart(copy=False)
        identity, message = first.bytes, second.bytes
        try:
            join = wire.decode_join(message)
        except UNREADABLE:
            log.warning("ignored a message that is no hello of a worker")
            return
        if not 0 <= join.worker < len(seats) or seats[join.worker].identity:
            refusal = f"worker {join.worker} is taken or outside [0, {len(seats)})"
        else:
            seat = seats[join.worker]
            # The monitor tells of a closed connection by nothing but its descriptor.
            seat.identity, seat.join, seat.connection = identity, join, int(second.get(zmq.SRCFD))
            self._orders.send_multipart([identity, welcome])
            return
        log.warning("refused a worker: %s", refusal)
        self._orders.send_multipart([identity, wire.encode(wire.Rejected(refusal))])

    def send(self, seats: Sequence[Seat], message: wire.ToWorker) -> list[Seat]:
        """To those that have joined; returns which of them are not connected any more."""
        encoded = wire.encode(message)
        lost = []
        with self._lock:
            for seat in seats:
                if seat.identity:
                    try:
                        self._orders.send_multipart([seat.identity, encoded])
                    except zmq.ZMQError:
                        lost.append(seat)
        return lost

    def receive(self, take: Callable[[wire.WorkerReply], None]) -> threading.Thread:
        """Start the thread that calls `take` for every reply."""
        thread = threading.Thread(target=self._receive, args=(take,), name="replies", daemon=True)
        thread.start()
        return thread

    def watch_connections(self) -> None:
        """After all have been admitted: until then outsiders come and go, and descriptors are used again."""
        self._monitor = self._orders.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def await_closed(self, seats: Sequence[Seat], seconds: float) -> list[Seat]:
        """Whose connections closed since the last call, in order; waits so long for one. One thread's."""
        assert self._monitor is not None, "await_closed() before watch_connections()"
        closed: list[Seat] = []
        patience = int(seconds * 1000)
        while self._monitor.poll(patience):
            connection = recv_monitor_message(self._monitor)["value"]
            closed += [seat for seat in seats if seat.connection == connection]
            patience = 0
        return closed

    def wake(self) -> None:
        """Ends the thread of receive()."""
        self._wake.send(b"x")

    def close(self) -> None:
        """After all threads that use the lines have ended."""
        if self._monitor is not None:
            self._orders.disable_monitor()
            self._monitor.close()
        for each in (self._orders, self._replies, self._closing, self._wake):
            each.close()
        self._context.term()

    def _receive(self, take: Callable[[wire.WorkerReply], None]) -> None:
        poller = zmq.Poller()
        for source in (self._replies, self._closing):
            poller.register(source, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._replies in ready:
                self._decode(self._replies.recv(), take)
            elif self._closing.fileno() in ready:
                break

    def _decode(self, message: bytes, take: Callable[[wire.WorkerReply], None]) -> None:
        try:
            reply = wire.decode_reply(message)
        except UNREADABLE:
            log.warning("ignored a message that is no worker's reply")
            return
        take(reply)
