"""A member's line to the coordinator: one TCP connection that says hello, beats once a second and hears orders.

A closed connection is the sign of death on both sides: the kernel closes it the moment a process is gone. Silence
is the sign of a stopped one: beats are acknowledged, and whoever is owed an answer for too long gives up. Who has not
asked is owed none: seconds in which this interpreter ran somebody else's code are not the coordinator's silence.
First both prove that they know the world's token (handshake.py). Then come frames: a four-byte big-endian length and
msgpack of a record from base.messages.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable

import msgspec

from moe_serve.base.errors import ConfigError, NotYet, RankTimeout
from moe_serve.base.messages import (
    UNREADABLE,
    Ack,
    FromMember,
    Heartbeat,
    Hello,
    Leaving,
    Refused,
    ToMember,
    Welcome,
)
from moe_serve.base.progress import Progress
from moe_serve.base.secret import NONCE_BYTES, PROOF_BYTES
from moe_serve.base.site import with_port
from moe_serve.world.handshake import answer_challenge, is_coordinator

MAX_FRAME = 1 << 26
HEADER = struct.Struct(">I")
BEAT_SECONDS = 1.0
PATIENCE_SECONDS = 8.0
"""Of silence; the last BEAT_SECONDS of it before the first beat that was not answered."""
PROOF_SECONDS = 5.0

_encoder = msgspec.msgpack.Encoder()
_to_member: msgspec.msgpack.Decoder[ToMember] = msgspec.msgpack.Decoder(ToMember)


def frame(message: FromMember | ToMember) -> bytes:
    """A record as bytes for the line."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


class Link:
    """Connects in the constructor (retrying for `connect_seconds`) and waits for the coordinator's welcome.

    `view` is what the welcome said. `on_message` and `on_lost` are called from the reading thread; `on_lost` at most
    once, and not after close().
    Raises RankTimeout if nobody answers, ConfigError if the coordinator refuses this member,
    NotYet if it does so for now.
    """

    def __init__(
        self,
        host: str,
        port: int,
        hello: Hello,
        *,
        token: str,
        on_message: Callable[[ToMember], None],
        on_lost: Callable[[str], None],
        progress: Progress,
        connect_seconds: float = 5.0,
    ) -> None:
        self._where = f"the coordinator at {with_port(host, port)}"
        self._on_message = on_message
        self._on_lost = on_lost
        self._progress = progress
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._socket = _meet(host, port, token, connect_seconds, self._where)
        self._socket.settimeout(PATIENCE_SECONDS)
        self._readable = select.poll()
        self._readable.register(self._socket, select.POLLIN)
        self._owed_since: float | None = time.monotonic()
        self.send(hello)
        first = self._first_answer()
        if isinstance(first, Refused):
            self._socket.close()
            if first.patience_seconds:
                raise NotYet(first.reason, patience_seconds=first.patience_seconds)
            raise ConfigError(first.reason)
        self.view = first.view
        threading.Thread(target=self._read, name="link-read", daemon=True).start()
        threading.Thread(target=self._beat, name="link-beat", daemon=True).start()

    def send(self, message: FromMember) -> None:
        """Send a record; a broken line is reported by the reading thread, not here."""
        try:
            with self._lock:
                self._socket.sendall(frame(message))
        except OSError:
            return

    def close(self, reason: str = "") -> None:
        """Leave on purpose."""
        if not self._closed.is_set():
            self._closed.set()
            self.send(Leaving(reason))
            self._socket.close()

    def _first_answer(self) -> Welcome | Refused:
        try:
            answer = _to_member.decode(self._receive())
        except (OSError, EOFError, *UNREADABLE) as error:
            self._socket.close()
            raise RankTimeout(f"{self._where} did not welcome this process: {error or 'no answer'}") from error
        if not isinstance(answer, Welcome | Refused):
            self._socket.close()
            raise RankTimeout(f"{self._where} answered a hello with {type(answer).__name__}")
        return answer

    def _receive(self) -> bytes:
        (length,) = HEADER.unpack(_exactly(self._receive_some, HEADER.size))
        if length > MAX_FRAME:
            raise EOFError(f"a frame of {length} bytes is longer than {MAX_FRAME}")
        return _exactly(self._receive_some, length)

    def _receive_some(self, count: int) -> bytes:
        """What has come, at most `count` bytes; TimeoutError once an answer is owed for too long."""
        while not self._readable.poll(BEAT_SECONDS * 1000):
            owed = self._owed_since
            if owed is not None and time.monotonic() - owed > PATIENCE_SECONDS - BEAT_SECONDS:
                raise TimeoutError
        received = self._socket.recv(count)
        self._owed_since = None
        return received

    def _read(self) -> None:
        try:
            while True:
                message = _to_member.decode(self._receive())
                if not isinstance(message, Ack):
                    self._on_message(message)
        except TimeoutError:
            self._lost(f"{self._where} was silent for {PATIENCE_SECONDS:g} s")
        except (OSError, EOFError, *UNREADABLE) as error:
            self._lost(f"{self._where} is gone ({error})")

    def _beat(self) -> None:
        progress = self._progress
        while not self._closed.wait(BEAT_SECONDS):
            where = Heartbeat(
                step=progress.step,
                phase=progress.phase,
                seconds=progress.seconds(),
                layer=progress.layer,
                unfinished=progress.unfinished,
            )
            self._owed_since = self._owed_since or time.monotonic()
            self.send(where)

    def _lost(self, why: str) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._on_lost(why)  # first: a beat that cannot get out may hold the lock for as long as our patience
            with self._lock:
                self._socket.close()


def _meet(host: str, port: int, token: str, seconds: float, where: str) -> socket.socket:
    """A connection whose both ends know the token. Tried again for so long: a crowd at the door may push us out."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            made = socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic()))
        except OSError as error:
            problem: Exception = error
        else:
            try:
                return _prove(made, token, where)
            except (OSError, EOFError) as error:
                problem = RankTimeout(f"who listens there does not answer as a coordinator does ({error})")
                made.close()
        if time.monotonic() + 0.2 > deadline:
            raise RankTimeout(f"{where} could not be reached within {seconds:g} s: {problem}") from problem
        time.sleep(0.2)


def _prove(made: socket.socket, token: str, where: str) -> socket.socket:
    """Show that this process knows the token, and see that the other does; ConfigError if not."""
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.settimeout(PROOF_SECONDS)
    nonce = _exactly(made.recv, NONCE_BYTES)
    answer = answer_challenge(token, nonce)
    made.sendall(answer)
    if not is_coordinator(token, nonce, answer, _exactly(made.recv, PROOF_BYTES)):
        made.close()
        raise ConfigError(f"{where} belongs to another world: this token is not its own")
    return made


def _exactly(receive: Callable[[int], bytes], count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = receive(count - len(parts))
        if not part:
            raise EOFError("connection closed")
        parts += part
    return bytes(parts)
