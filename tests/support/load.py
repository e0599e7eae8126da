"""Streamed requests under way at a real server, each in a thread of its own, and how each of them ended."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.server import Server


@dataclass(slots=True)
class Stream:
    """What one client saw. `broken` says that the connection was cut; `ended` is a time of the monotonic clock."""

    num_events: int = 0
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    broken: bool = False
    ended: float | None = None


@dataclass(slots=True)
class Load:
    """`count` greedy streams of `max_tokens` tokens; ready once each has seen its first events."""

    server: Server
    count: int = 6
    max_tokens: int = 900
    streams: list[Stream] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, seconds: float = 60.0) -> Load:
        for number in range(self.count):
            self.streams.append(Stream())
            thread = threading.Thread(target=self._follow, args=(number,), daemon=True)
            thread.start()
            self._threads.append(thread)
        deadline = time.monotonic() + seconds
        while any(stream.num_events < 2 for stream in self.streams):
            assert time.monotonic() < deadline, f"no tokens within {seconds:g} s: {self.streams}\n{self.server.log()}"
            time.sleep(0.01)
        assert all(stream.ended is None for stream in self.streams), f"too short a load: {self.streams}"
        return self

    def wait_ended(self, seconds: float) -> list[Stream]:
        """Until all streams have ended, at most so long; those that have not."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return [stream for stream in self.streams if stream.ended is None]

    def _follow(self, number: int) -> None:
        stream = self.streams[number]
        try:
            for event in self.server.stream(f"number {number}", max_tokens=self.max_tokens, ignore_eos=True):
                stream.num_events += 1
                stream.error = event.get("error", stream.error)
                for choice in event.get("choices", ()):
                    stream.finish_reason = choice["finish_reason"] or stream.finish_reason
        except httpx.TransportError:
            stream.broken = True
        finally:
            stream.ended = time.monotonic()


class Probe:
    """Asks /readyz again and again until stopped; `seen` are the different answers in order (0: nobody answers)."""

    def __init__(self, server: Server) -> None:
        self.seen: list[int] = []
        self._url = server.base_url + "/readyz"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> list[int]:
        self._stopped.set()
        self._thread.join(10)
        return self.seen

    def _run(self) -> None:
        with httpx.Client(timeout=2) as client:
            while not self._stopped.wait(0.02):
                try:
                    answer = client.get(self._url).status_code
                except httpx.TransportError:
                    answer = 0
                if self.seen[-1:] != [answer]:
                    self.seen.append(answer)
