"""A node of several ports for tests: a supervisor, found at its own port, and the ranks' servers beside it."""

from __future__ import annotations

import socket
import time
from typing import Any

import httpx

from tests.support.server import READY_SECONDS, Server

PATIENCE = 5.0


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody has now."""
    for _ in range(100):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            first = int(found.getsockname()[1])
        if first + count < 2**16 and all(is_free(first + place) for place in range(count)):
            return first
    raise AssertionError(f"no {count} free ports beside each other")


def is_free(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class SupervisedNode(Server):
    """`num_ranks` ranks from `port` on, their supervisor at the port behind them."""

    def __init__(self, *arguments: str, num_ranks: int, token: str | None = None) -> None:
        self.port = free_ports(num_ranks + 1)
        self.num_ranks = num_ranks
        ports = ("--port", str(self.port), "--data-parallel-supervisor-port", str(self.port + num_ranks))
        super().__init__(*arguments, "--data-parallel-multi-port-external-lb", *ports, token=token)
        self.base_url = f"http://127.0.0.1:{self.port}"

    def ask(self, path: str) -> httpx.Response | None:
        """The supervisor's answer; None if nobody listens."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.port + self.num_ranks}{path}", timeout=PATIENCE)
        except httpx.TransportError:
            return None

    def is_ready(self) -> bool:
        answer = self.ask("/readyz")
        return answer is not None and answer.status_code == 200

    def wait_ready(self, seconds: float = READY_SECONDS) -> SupervisedNode:
        """AssertionError with the log if the supervisor ends or is late."""
        deadline = time.monotonic() + seconds
        while not self.is_ready():
            assert time.monotonic() < deadline, f"not ready:\n{self.log()}"
            assert self.process.poll() is None, f"exit code {self.process.poll()}:\n{self.log()}"
            time.sleep(0.1)
        return self

    def wait_red(self, seconds: float) -> str:
        """Until it is not ready; why."""
        deadline = time.monotonic() + seconds
        while (answer := self.ask("/readyz")) is not None and answer.status_code == 200:
            assert time.monotonic() < deadline, f"still ready:\n{self.log()}"
            time.sleep(0.05)
        return "" if answer is None else str(answer.json()["reason"])

    def ranks(self) -> list[dict[str, Any]]:
        answer = self.ask("/ranks")
        assert answer is not None
        found: list[dict[str, Any]] = answer.json()["ranks"]
        return found

    def use(self, place: int) -> SupervisedNode:
        """Ask the rank at this place of the node from now on."""
        self.base_url = f"http://127.0.0.1:{self.port + place}"
        return self
