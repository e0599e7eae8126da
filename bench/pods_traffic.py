"""Clients of pods: streams that never stop coming, how each of them ended, and how long that took."""

from __future__ import annotations

import asyncio
import collections
import json
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import httpx

if TYPE_CHECKING:
    from bench.pods import Pods

End = Literal["answer", "error", "cut", "refused", "hung"]
"""All of its tokens; an error event; a connection that broke; not taken in at all; nothing for HUNG_SECONDS."""
HUNG_SECONDS = 45.0
PAUSE_SECONDS = 0.3


@dataclass(slots=True)
class Stream:
    """`taken`: it has had its first event. Times of the monotonic clock."""

    begun: float
    taken: float | None = None
    ended: float | None = None
    end: End | None = None
    error: str = ""

    def was_under_way(self, moment: float) -> bool:
        return self.taken is not None and self.taken < moment and (self.ended is None or self.ended > moment)


class Traffic:
    """`count` clients in pod `client`, each with one stream after the other, until `close()`."""

    def __init__(self, pods: Pods, client: str, url: str, *, count: int, max_tokens: int) -> None:
        self.streams: list[Stream] = []
        self._url, self._count, self._max_tokens = url, count, max_tokens
        self._closing = threading.Event()
        self._thread = threading.Thread(target=pods.inside, args=(client, lambda: asyncio.run(self._run())))
        self._thread.start()

    def under_way(self) -> list[Stream]:
        """Those that are answered at this moment."""
        now = time.monotonic()
        return [stream for stream in self.streams if stream.was_under_way(now)]

    def wait_under_way(self, least: int, seconds: float = 60.0) -> list[Stream]:
        """Until so many streams are answered at once."""
        deadline = time.monotonic() + seconds
        while len(found := self.under_way()) < least:
            if time.monotonic() > deadline:
                raise RuntimeError(f"only {len(found)} streams are under way after {seconds:g} s")
            time.sleep(0.02)
        return found

    def ends(self) -> dict[str, int]:
        """How all that have ended did."""
        return dict(collections.Counter(stream.end for stream in self.streams if stream.end is not None))

    def close(self) -> None:
        """Send no more, and wait for the last answers."""
        self._closing.set()
        self._thread.join()

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=None) as http:
            await asyncio.gather(*(self._follow(http, number) for number in range(self._count)))

    async def _follow(self, http: httpx.AsyncClient, number: int) -> None:
        while not self._closing.is_set():
            stream = Stream(time.monotonic())
            self.streams.append(stream)
            try:
                async with asyncio.timeout(HUNG_SECONDS):
                    stream.end = await self._receive(http, stream, f"client {number}")
            except TimeoutError:
                stream.end = "hung"
            except httpx.TransportError as error:
                stream.error = repr(error)
                stream.end = "refused" if stream.taken is None else "cut"
            stream.ended = time.monotonic()
            if stream.end != "answer":
                await asyncio.sleep(PAUSE_SECONDS)

    async def _receive(self, http: httpx.AsyncClient, stream: Stream, prompt: str) -> End:
        body = {"prompt": prompt, "max_tokens": self._max_tokens, "ignore_eos": True, "stream": True, "temperature": 0}
        async with http.stream("POST", f"{self._url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                return "refused"
            finished = False
            async for line in response.aiter_lines():
                stream.taken = stream.taken or time.monotonic()
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        stream.error = str(event["error"])
                        return "error"
                    finished |= any(choice["finish_reason"] for choice in event["choices"])
            return "answer" if finished else "cut"
