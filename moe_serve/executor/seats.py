"""A worker's place in its engine, and how people are told of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from moe_serve.base.errors import WorkerDied
from moe_serve.executor.starting import Started
from moe_serve.worker.wire import Join


@dataclass(slots=True)
class Seat:
    """The worker started for a place, and once it has joined, what it said and where its words come from.

    `connection` is the descriptor of its line. An engine's seats are a sequence by worker index.
    """

    name: str
    started: Started
    identity: bytes = b""
    connection: int = -1
    join: Join | None = None
    gone_since: float | None = None

    @property
    def who(self) -> str:
        origin = self.started.who if self.join is None else f"pid {self.join.pid} on {self.join.host}"
        return f"worker {self.name}, {origin}"

    def death(self, when: str) -> WorkerDied | None:
        """How it came to its end, if that is known."""
        return None if self.started.poll() is None else WorkerDied(f"{self.who} {self.started.fate()} {when}")


def name_missing(seats: Sequence[Seat], came: Collection[int]) -> str:
    """Workers whose index is not in `came`. The others may only be waiting for one that is stopped."""
    missing = [seat for worker, seat in enumerate(seats) if worker not in came]
    stopped = [f"{seat.who} (stopped)" for seat in missing if seat.started.is_stopped()]
    return "; ".join(stopped or [seat.who for seat in missing])
