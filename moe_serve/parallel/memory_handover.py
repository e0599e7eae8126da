"""One piece of memory for the ranks of a machine: made by the first, handed to the others through a socket, nameless.

The memory is a memfd: it is in no file system and ends with the last process that has it. The socket is one of the
abstract kind, under a random name; who comes must know a secret that the ranks have agreed on over their group.
Beside the memory each rank gets the writing end of a pipe of its own and the reading ends of the others' pipes: the
kernel closes them with the process, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hmac
import os
import secrets
import socket
import struct
import time
from dataclasses import dataclass

from moe_serve.base.memory import available_memory

NAME_BYTES, SECRET_BYTES = 16, 32
HELLO = struct.Struct(f"<{SECRET_BYTES}sI")
MOST_OF_AVAILABLE = 0.5
STRANGER_SECONDS = 1.0
"""For somebody who has connected to say who he is."""
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""Nobody can cut the memory under another's feet."""
PEER = struct.Struct("3i")


@dataclass(slots=True)
class Descriptors:
    """What a rank has of it: the memory, its own life line, those of the others in order of rank."""

    memory: int
    own_life: int
    lives: list[int]

    def close(self) -> None:
        """All of them. Safe to call twice."""
        for descriptor in (self.memory, self.own_life, *self.lives):
            if descriptor >= 0:
                os.close(descriptor)
        self.memory = self.own_life = -1
        self.lives = []

    def close_memory(self) -> None:
        """Once it is mapped."""
        os.close(self.memory)
        self.memory = -1


@dataclass(frozen=True, slots=True)
class Offer:
    """What the ranks agree on over their group: the socket's name, the secret, or the error that ended it already."""

    name: bytes
    secret: bytes
    error: int = 0

    def packed(self) -> bytes:
        return self.name + self.secret + struct.pack("<i", self.error)

    @classmethod
    def unpacked(cls, data: bytes) -> Offer:
        end = NAME_BYTES + SECRET_BYTES
        return cls(data[:NAME_BYTES], data[NAME_BYTES:end], struct.unpack("<i", data[end:])[0])

    @property
    def address(self) -> str:
        return f"\0moe-serve-{self.name.hex()}"


OFFER_BYTES = len(Offer(bytes(NAME_BYTES), bytes(SECRET_BYTES)).packed())


class Giver:
    """The first rank's side. `offer` is for the group; give() answers those who come."""

    def __init__(self, num_bytes: int, size: int) -> None:
        self._stack = contextlib.ExitStack()
        self._parcels: dict[int, list[int]] = {}
        self.own: Descriptors | None = None
        self.offer = Offer(secrets.token_bytes(NAME_BYTES), secrets.token_bytes(SECRET_BYTES))
        try:
            self._prepare(num_bytes, size)
        except OSError as error:
            self.close()
            self.offer = Offer(self.offer.name, self.offer.secret, error.errno or errno.EIO)

    def give(self, deadline: float) -> Descriptors:
        """Hand it to all others until `deadline` (of time.monotonic()); OSError if somebody did not come."""
        waiting = dict(self._parcels)
        while waiting:
            self._listening.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                line = self._listening.accept()[0]
            except TimeoutError as error:
                names = ", ".join(map(str, waiting))
                raise TimeoutError(errno.ETIMEDOUT, f"ranks {names} did not fetch it") from error
            with line:
                self._answer(line, waiting)
        assert self.own is not None
        own, self.own = self.own, None
        return own

    def close(self) -> None:
        """Everything that was not handed on. Safe to call twice."""
        self._stack.close()
        if self.own is not None:
            self.own.close()
            self.own = None

    def _prepare(self, num_bytes: int, size: int) -> None:
        memory = self._keep(make_memory(f"moe-serve-{self.offer.name.hex()[:8]}", num_bytes))
        pipes = [tuple(map(self._keep, os.pipe())) for _ in range(size)]
        for rank in range(size):
            lives = [reading for other, (reading, _) in enumerate(pipes) if other != rank]
            self._parcels[rank] = [memory, pipes[rank][1], *lives]
        first = self._parcels.pop(0)
        self.own = Descriptors(os.dup(first[0]), os.dup(first[1]), list(map(os.dup, first[2:])))
        self._listening = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        self._listening.bind(self.offer.address)
        self._listening.listen(size + 8)

    def _keep(self, descriptor: int) -> int:
        """Until close()."""
        self._stack.callback(os.close, descriptor)
        return descriptor

    def _answer(self, line: socket.socket, waiting: dict[int, list[int]]) -> None:
        """A stranger, or a rank that has its parcel already, gets nothing."""
        uid = PEER.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))[1]
        if uid != os.getuid():
            return
        line.settimeout(STRANGER_SECONDS)
        with contextlib.suppress(OSError):
            said = line.recv(HELLO.size, socket.MSG_WAITALL)
            secret, rank = HELLO.unpack(said.ljust(HELLO.size, b"\0"))
            if hmac.compare_digest(secret, self.offer.secret) and rank in waiting:
                socket.send_fds(line, [b"\1"], waiting[rank])
                del waiting[rank]


def take(offer: Offer, rank: int, size: int, deadline: float) -> Descriptors:
    """Another rank's side; OSError if there is nothing to be had until `deadline`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(max(deadline - time.monotonic(), 0.001))
        line.connect(offer.address)
        line.sendall(HELLO.pack(offer.secret, rank))
        said, found, _, _ = socket.recv_fds(line, 1, size + 1, socket.MSG_CMSG_CLOEXEC)
    if not said or len(found) != size + 1:
        for descriptor in found:
            os.close(descriptor)
        raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    return Descriptors(found[0], found[1], list(found[2:]))


def make_memory(name: str, num_bytes: int) -> int:
    """A memfd all of whose pages are there: what cannot be had is an OSError now, and no SIGBUS later.

    The kernel would take page after page before it finds out, and kill somebody to have more: so it is asked first.
    """
    if num_bytes > available_memory() * MOST_OF_AVAILABLE:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, num_bytes)
        os.posix_fallocate(descriptor, 0, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
