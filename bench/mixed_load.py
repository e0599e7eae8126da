"""Everything at once: clients whose answers are known, clients that leave, hostile bodies, strangers, moving experts.

Whatever is not as it should be is in `MixedLoad.wrong`.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import httpx
import msgspec

from bench.http_stream import Address, StreamFailed, get_json, post_events, post_json
from tests.support.bad_requests import BAD, LARGE, MAX_REFUSAL_CHARACTERS
from tests.support.letters import text_of
from tests.support.strangers import knock

NUM_ASKS = 24
LEAST_GAP = 1e-3
"""Between the log-probabilities of a greedy token and the next best: nearer ones may turn with the batch."""
MAX_WRONG = 100
AFTER_WRONG_SECONDS = 0.5
STOP_SECONDS = 90.0
HTTP_SECONDS = 60.0
Answer = dict[int, str]


@dataclass(frozen=True, slots=True)
class Ask:
    """A request whose answer is the same each time, streamed or whole."""

    path: str
    body: Mapping[str, object]

    async def answer(self, address: Address) -> Answer:
        """The text of each choice; StreamFailed unless all of them came to their end."""
        texts: Answer = {}
        reasons: dict[int, str | None] = {}
        async for event in self._events(address):
            if "error" in event:
                raise StreamFailed(str(event["error"]))
            for choice in event["choices"]:
                piece = choice.get("delta") or choice.get("message") or choice
                text = piece.get("content", piece.get("text")) or ""
                texts[choice["index"]] = texts.get(choice["index"], "") + text
                reasons[choice["index"]] = choice["finish_reason"] or reasons.get(choice["index"])
        if set(reasons.values()) != {"length"}:
            raise StreamFailed(f"the choices ended with {reasons}")
        return texts

    async def _events(self, address: Address) -> Any:
        if self.body.get("stream"):
            async for event in post_events(address, self.path, msgspec.json.encode(self.body)):
                yield event
        else:
            yield await post_json(address, self.path, self.body)


async def known_asks(address: Address, vocab_size: int, numbers: random.Random) -> list[tuple[Ask, Answer]]:
    """Requests of each kind with the answers of a server at rest."""
    known: list[tuple[Ask, Answer]] = []
    for kind in cycle(KINDS):
        if len(known) == NUM_ASKS:
            break
        lengths = [numbers.choice([3, 17, 60, 120]) for _ in range(2)]
        prompts = [[numbers.randrange(3, vocab_size) for _ in range(length)] for length in lengths]
        max_tokens = numbers.choice([8, 24, 64, 96])
        if all([await _is_clear(address, prompt, max_tokens) for prompt in prompts]):
            ask = KINDS[kind](prompts, {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True})
            known.append((ask, await ask.answer(address)))
    return known


def _of_prompts(path: str, **more: object) -> Callable[[list[list[int]], dict[str, object]], Ask]:
    def make(prompts: list[list[int]], body: dict[str, object]) -> Ask:
        if "chat" in path:
            return Ask(path, {**body, **more, "messages": [{"role": "user", "content": text_of(prompts[0])}]})
        return Ask(path, {**body, **more, "prompt": prompts if more.get("n") else prompts[0]})

    return make


KINDS = {
    "streamed": _of_prompts("/v1/completions", stream=True),
    "whole": _of_prompts("/v1/completions"),
    "chat": _of_prompts("/v1/chat/completions", stream=True),
    "two prompts": _of_prompts("/v1/completions", n=2, stream=True),
    "scored": _of_prompts("/v1/completions", echo=True, logprobs=2),
}


async def _is_clear(address: Address, prompt: list[int], max_tokens: int) -> bool:
    """Whether no token of the greedy answer was a near tie."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "logprobs": 2}
    answer = await post_json(address, "/v1/completions", body)
    best = [sorted(top.values())[-2:] for top in answer["choices"][0]["logprobs"]["top_logprobs"]]
    return all(high - low > LEAST_GAP for low, high in best)


@dataclass(slots=True)
class MixedLoad:
    """`start()`, then `stop()`. `counts` what was done; `wrong` what should not have been, the first hundred."""

    address: Address
    known: Sequence[tuple[Ask, Answer]]
    ports: Sequence[int]
    clients: int = 6
    leavers: int = 2
    knock_pause: float = 0.05
    large_pause: float = 5.0
    move_pause: float = 2.0
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    knocks: dict[int, int] = field(default_factory=dict)
    _http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=HTTP_SECONDS))
    _stop: threading.Event = field(default_factory=threading.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Begin all of it; nothing waits for anything else."""
        loops = [self._again(f"client {number}", self._ask, random.Random(number)) for number in range(self.clients)]
        loops += [self._again("leaver", self._leave, random.Random(-1 - number)) for number in range(self.leavers)]
        loops.append(self._again("order", self._move, random.Random("moves")))
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        attackers = [threading.Thread(target=self._knock, args=(port,), daemon=True) for port in self.ports]
        attackers += [threading.Thread(target=each, daemon=True) for each in (self._send_bad, self._send_large)]
        for thread in attackers:
            thread.start()
        self._threads = attackers

    async def stop(self) -> None:
        """Let what is under way come to its end; what does not in time is wrong."""
        self._stop.set()
        _, late = await asyncio.wait(self._tasks, timeout=STOP_SECONDS)
        for task in late:
            self._note(f"a request did not end within {STOP_SECONDS:g} s")
            task.cancel()
        for thread in self._threads:
            await asyncio.to_thread(thread.join, HTTP_SECONDS)
        self._http.close()

    async def _again(
        self, who: str, act: Callable[[random.Random], Coroutine[Any, Any, None]], numbers: random.Random
    ) -> None:
        while not self._stop.is_set():
            try:
                await act(numbers)
            except (OSError, StreamFailed, KeyError, ValueError) as error:
                self._note(f"{who}: {type(error).__name__}: {error}")
                await asyncio.sleep(AFTER_WRONG_SECONDS)

    async def _ask(self, numbers: random.Random) -> None:
        ask, expected = numbers.choice(self.known)
        found = await ask.answer(self.address)
        self.counts["answers"] += 1
        self.counts["characters"] += sum(map(len, found.values()))
        if found != expected:
            self.counts["changed"] += 1
            self._note(f"a changed answer to {str(ask)[:300]}: {found} instead of {expected}")

    async def _leave(self, numbers: random.Random) -> None:
        """Ask for a long answer and hang up: in the head, in the body, before or after the first tokens."""
        body = msgspec.json.encode(dict(self.known[0][0].body) | {"max_tokens": 300, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        _, writer = await asyncio.open_connection(self.address.host, self.address.port)
        try:
            whole = head + body
            writer.write(whole if numbers.random() < 0.7 else whole[: numbers.randrange(len(whole))])
            await writer.drain()
            await asyncio.sleep(numbers.choice([0, 0.01, 0.1, 0.4]))
        finally:
            writer.transport.abort()
        self.counts["disconnects"] += 1

    async def _move(self, numbers: random.Random) -> None:
        """Have experts moved, and ask all that a dashboard asks."""
        await asyncio.sleep(self.move_pause)
        try:
            await post_json(self.address, *numbers.choice(ORDERS))
            self.counts["orders"] += 1
        except StreamFailed as refusal:
            if not any(each in str(refusal) for each in NO_ORDER):
                raise
        await get_json(self.address, "/eplb")
        await get_json(self.address, "/config")
        figures = await asyncio.to_thread(self._http.get, f"{self._url}/metrics")
        for name, metric in FIGURES.items():
            found = re.search(rf"{metric}\{{[^}}]*\}} ([0-9.e+]+)", figures.text)
            if found is None:
                raise ValueError(f"{metric} is not in /metrics: {figures.text[:300]}")
            self.counts[name] = int(float(found.group(1)))

    def _knock(self, port: int) -> None:
        self.knocks[port] = knock(port, self._stop, pause=self.knock_pause)

    def _send_bad(self) -> None:
        bodies = cycle(BAD)
        while not self._stop.wait(self.knock_pause):
            path, body, status, param = next(bodies)
            answer = self._send(path, json.dumps(body).encode(), f"{path} {str(body)[:200]}")
            if answer is not None and (answer.status_code, answer.json()["error"]["param"]) != (status, param):
                self._note(f"{body} got {answer.status_code} {answer.text[:300]}")

    def _send_large(self) -> None:
        bodies = cycle(LARGE.items())
        while not self._stop.wait(self.large_pause):
            name, (path, body) = next(bodies)
            answer = self._send(path, body(), name)
            if answer is not None and (
                not 400 <= answer.status_code < 500 or len(answer.text) > MAX_REFUSAL_CHARACTERS
            ):
                self._note(f"{name} got {answer.status_code} {answer.text[:300]}")

    def _send(self, path: str, body: bytes, name: str) -> httpx.Response | None:
        """The answer to a hostile body; None, and noted, if there was none."""
        headers = {"Content-Type": "application/json"}
        try:
            answer = self._http.post(self._url + path, content=body, headers=headers)
        except httpx.HTTPError as error:
            self._note(f"{name} got no answer: {type(error).__name__}: {error}")
            self._stop.wait(AFTER_WRONG_SECONDS)
            return None
        self.counts["hostile bodies"] += 1
        return answer

    @property
    def _url(self) -> str:
        return f"http://{self.address.host}:{self.address.port}"

    def _note(self, what: str) -> None:
        self.counts["wrong"] += 1
        if len(self.wrong) < MAX_WRONG:
            self.wrong.append(what)


FIGURES = {"rearrangements": "eplb_rebalances_total", "experts moved": "eplb_moved_experts_total"}
NO_ORDER = ("HTTP 409", "nothing to do")
"""Another one is under way, or sticky finds nothing better: neither is wrong."""
ORDERS: list[tuple[str, dict[str, object]]] = [
    ("/eplb/apply", {"policy": "shuffle"}),
    ("/eplb/apply", {"policy": "shuffle"}),
    ("/eplb/apply", {"policy": "sticky"}),
    ("/eplb/plan", {"policy": "deepseek"}),
]
