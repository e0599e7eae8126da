"""`doctor --listen`: answers other doctors for a while. Who does not know the token gets no further than the proof.

Bounds: so many lines at once, so many seconds and bytes for each, and an end by itself. It connects to nobody but to
the address that a line comes from.
"""

from __future__ import annotations

import contextlib
import platform
import socket
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import msgspec

from moe_serve.base.errors import ConfigError
from moe_serve.base.site import with_port
from moe_serve.base.version import package_version
from moe_serve.doctor.line import Line, LineError, NotTheSameToken, answer_call
from moe_serve.doctor.ports import OpenPorts, try_ports
from moe_serve.doctor.records import (
    BULK_SECONDS,
    MAX_BULK,
    Arrived,
    Clock,
    ClockAsk,
    GiveBulk,
    Opened,
    OpenSome,
    TakeBulk,
    ToListener,
    TriedYours,
    TryMine,
    Versions,
)

LINE_SECONDS = 60.0
MAX_LINES = 16
MAX_LINE_BULK = 4 * MAX_BULK
POLL_SECONDS = 0.2
IP_MTU = 14
IPV6_MTU = 24
"""Linux's numbers (ip(7), ipv6(7)), which the socket module lacks."""
_to_listener: msgspec.msgpack.Decoder[ToListener] = msgspec.msgpack.Decoder(ToListener)


class Listener:
    """Listens from the constructor on; `run()` answers for `seconds`, and gives the number of doctors that proved
    themselves. `tell` is called with a line about each. ConfigError if the port cannot be had."""

    def __init__(self, host: str, port: int, *, token: str, tell: Callable[[str], None]) -> None:
        self._token = token
        self._tell = tell
        self._places = threading.Semaphore(MAX_LINES)
        self._came: set[str] = set()
        self._ending = threading.Event()
        try:
            everywhere = not host and socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if everywhere or ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family, dualstack_ipv6=everywhere)
        except OSError as error:
            raise ConfigError(
                f"doctor cannot listen on {with_port(host or '*', port)}: {error.strerror or error} (options --host "
                "and --port; while a server runs here, choose another port on both sides)"
            ) from error
        self._socket.settimeout(POLL_SECONDS)

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def run(self, seconds: float) -> int:
        deadline = time.monotonic() + seconds
        with self._socket:
            while time.monotonic() < deadline and not self._ending.is_set():
                try:
                    connection, address = self._socket.accept()
                except TimeoutError:
                    continue
                except OSError:
                    time.sleep(POLL_SECONDS)
                    continue
                if self._places.acquire(blocking=False):
                    until = min(deadline, time.monotonic() + LINE_SECONDS)
                    told = (connection, _plain(address[0]), until)
                    threading.Thread(target=self._serve, args=told, daemon=True).start()
                else:
                    connection.close()
        return self.num_came

    @property
    def num_came(self) -> int:
        return len(self._came)

    def end(self) -> None:
        """From another thread."""
        self._ending.set()

    def _serve(self, connection: socket.socket, address: str, deadline: float) -> None:
        try:
            with connection, contextlib.ExitStack() as stack:
                line = answer_call(connection, self._token, deadline)
                if address not in self._came:
                    self._came.add(address)
                    self._tell(f"{address} came")
                _Session(line, address, stack).run()
        except NotTheSameToken:
            self._tell(f"{address} was refused: it does not know this token")
        except LineError:
            return  # it has left, or its time is over
        finally:
            self._places.release()


class _Session:
    """One line of a doctor at `address`. What it opens is closed with `stack`."""

    def __init__(self, line: Line, address: str, stack: contextlib.ExitStack) -> None:
        self._line = line
        self._address = address
        self._stack = stack
        self._bulk = 0
        self._has_opened = False

    def run(self) -> None:
        """Until the line ends."""
        while True:
            self._answer(self._line.receive(_to_listener))

    def _answer(self, asked: ToListener) -> None:
        line = self._line
        match asked:
            case Versions():
                line.send(versions(line.socket, self._address))
            case ClockAsk():
                line.send(Clock(time.time()))
            case OpenSome():
                line.send(self._open(asked.chosen))
            case TryMine():
                line.send(TriedYours(try_ports(self._address, asked.ports, line.secret)))
            case TakeBulk():
                line.send(Arrived(line.pull(self._counted(asked.count), BULK_SECONDS)))
            case GiveBulk():
                line.push_zeros(self._counted(asked.count))

    def _open(self, chosen: list[int]) -> Opened:
        if self._has_opened:
            raise LineError("ports are opened once for each line")
        self._has_opened = True
        opened = OpenPorts(own_address(self._line.socket), chosen, self._line.secret)
        self._stack.callback(opened.close)
        return Opened(opened.ports, opened.failed)

    def _counted(self, count: int) -> int:
        self._bulk += count
        if not 0 <= count <= MAX_BULK or self._bulk > MAX_LINE_BULK:
            raise LineError(f"{count} bytes are more than one may ask for")
        return count


def versions(connection: socket.socket, address: str) -> Versions:
    """Of this end of a connection with `address`."""
    try:
        torch = version("torch").partition("+")[0]
    except PackageNotFoundError:
        torch = ""
    return Versions(
        package=package_version(),
        python=platform.python_version(),
        torch=torch,
        host=socket.gethostname(),
        you=address,
        mtu=path_mtu(connection),
        segment=_option(connection, socket.IPPROTO_TCP, socket.TCP_MAXSEG),
    )


def path_mtu(connection: socket.socket) -> int | None:
    """What the kernel believes the way to the other end to carry: the device's, or less where it has learnt of it."""
    mapped = "." in connection.getpeername()[0]  # IPv4, perhaps in IPv6's dress
    return _option(connection, *((socket.IPPROTO_IP, IP_MTU) if mapped else (socket.IPPROTO_IPV6, IPV6_MTU)))


def own_address(connection: socket.socket) -> str:
    """This machine's own on the way to the other end."""
    return _plain(connection.getsockname()[0])


def _option(connection: socket.socket, level: int, name: int) -> int | None:
    try:
        return connection.getsockopt(level, name)
    except OSError:
        return None


def _plain(address: str) -> str:
    """IPv4 in IPv6's dress is IPv4."""
    return address.removeprefix("::ffff:") if "." in address else address
