"""Steady load: so many clients, each with one streamed request after the other, and when every token came."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from bench.http_stream import Address, post_events

Prompt = Callable[[random.Random], str]


@dataclass(frozen=True, slots=True)
class Gap:
    """The wait for a token that was not the first of its answer: when it ended, and how long it was, in seconds."""

    end: float
    seconds: float


@dataclass(slots=True)
class SteadyLoad:
    """`num_clients` streams at a time until stop(); `prompt` makes the next prompt. Times are time.monotonic()."""

    address: Address
    num_clients: int
    output_len: int
    prompt: Prompt
    seed: int = 0
    gaps: list[Gap] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    _stopped: bool = False
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self) -> None:
        """Begin; the clients run in the background."""
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(self.num_clients)]

    async def stop(self) -> None:
        """Let the answers in flight come to their end."""
        self._stopped = True
        await asyncio.gather(*self._tasks)

    def check(self) -> None:
        """Raise what a client met with."""
        for task in self._tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                task.result()

    async def _client(self, number: int) -> None:
        numbers = random.Random(self.seed * 1000 + number)
        while not self._stopped:
            body = {
                "prompt": self.prompt(numbers),
                "max_tokens": numbers.randint(self.output_len // 2, self.output_len),
                "temperature": 0.8,
                "seed": numbers.randrange(1 << 30),
                "ignore_eos": True,
                "stream": True,
            }
            last: float | None = None
            async for _ in post_events(self.address, "/v1/completions", msgspec.json.encode(body)):
                now = time.monotonic()
                self.token_times.append(now)
                if last is not None:
                    self.gaps.append(Gap(now, now - last))
                last = now
