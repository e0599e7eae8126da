"""Engines in memory for the HTTP floor: each answer is worked out from its prompt, nothing is computed.

Tests steer them while a server runs: slow them down, hold them, let them fail, let them die.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Self

from moe_serve.base.commands import TokenLogprob
from moe_serve.base.engine_messages import FinishReason, LoadReport, TokenEvent
from moe_serve.base.errors import EngineDead, RequestError
from moe_serve.base.sampling import SamplingParams
from moe_serve.engine.admission import EngineRoom
from tests.support.fakes import NOTHING, absorb, choose

POLL_SECONDS = 0.005
FORCING_BIAS = 100
Tokens = Iterable[int]


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it reached the engines."""

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    rank: int
    pinned: bool
    group: str


class FakeStream:
    """SequenceStream of a FakeEngines. `leave` is called once, at the end: True if the last event has come."""

    def __init__(self, rank: int, events: AsyncGenerator[TokenEvent, None], leave: Callable[[bool], None]) -> None:
        self.rank = rank
        self._events = events
        self._leave = leave
        self._open = True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        if not self._open:
            raise StopAsyncIteration
        try:
            event = await anext(self._events)
        except Exception:
            await self.aclose()
            raise
        if event.finish_reason is not None:
            self._end(finished=True)
        return event

    async def aclose(self) -> None:
        self._end(finished=False)
        await self._events.aclose()

    def _end(self, *, finished: bool) -> None:
        if self._open:
            self._open = False
            self._leave(finished)


class FakeEngines:
    """AsyncEngines. `script` gives the tokens of an answer; the default ones depend on prompt and seed alone.

    While a server runs, a test may set: `seconds_per_event`; `hold_after` (events that come before an answer stands
    still); `tokens_per_event`; `failure` (raised instead of the second event); `refusal` (raised at once).
    `received` and `aborted` tell what happened.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
        data_parallel_size: int = 2,
        max_model_len: int = 256,
        script: Callable[[list[int], SamplingParams], Tokens] | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.data_parallel_size = data_parallel_size
        self.served = range(data_parallel_size)
        self.max_model_len = max_model_len
        self.script = script
        self.num_places = 128
        self.ready = True
        self.dead_reason: str | None = None
        self.seconds_per_event = 0.0
        self.hold_after: int | None = None
        self.tokens_per_event = 1
        self.failure: Exception | None = None
        self.refusal: Exception | None = None
        self.received: list[Received] = []
        self.aborted: list[str] = []
        self._running: dict[str, int] = {}
        self._steps = 0

    @property
    def alive(self) -> bool:
        return self.dead_reason is None

    def die(self, reason: str = "engine dp 1 (pid 7) was killed") -> None:
        """Every open answer ends with EngineDead."""
        self.dead_reason = reason
        self.ready = False

    def calm(self) -> None:
        """Back to the behaviour of a new object; what was received is forgotten."""
        self.dead_reason, self.ready = None, True
        self.seconds_per_event, self.hold_after, self.tokens_per_event = 0.0, None, 1
        self.failure = self.refusal = self.script = None
        self.received, self.aborted = [], []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def reports(self) -> Mapping[int, LoadReport]:
        ranks = list(self._running.values())
        return {
            rank: LoadReport(num_running=ranks.count(rank), num_blocks=64, free_blocks=48, steps=self._steps, votes=3)
            for rank in range(self.data_parallel_size)
        }

    @property
    def running(self) -> Mapping[int, Mapping[str, str]]:
        return {rank: {"device": "none"} for rank in range(self.data_parallel_size)}

    @property
    def room(self) -> EngineRoom:
        return EngineRoom(self.num_places * self.data_parallel_size, 4096 * self.data_parallel_size)

    async def submit(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: SamplingParams,
        *,
        dp_rank: int | None = None,
        group: str = "",
    ) -> FakeStream:
        """See AsyncEngines.submit."""
        self._check_alive()
        if self.refusal is not None:
            raise self.refusal
        assert sampling.n == 1
        assert sampling.max_tokens is not None
        assert len(token_ids) + sampling.max_tokens <= self.max_model_len
        assert request_id not in self._running
        rank = len(self.received) % self.data_parallel_size if dp_rank is None else dp_rank
        self.received.append(Received(request_id, token_ids, sampling, rank, dp_rank is not None, group))
        self._running[request_id] = rank
        return FakeStream(rank, self._paced(request_id, token_ids, sampling), partial(self._leave, request_id))

    async def _paced(
        self, request_id: str, token_ids: list[int], sampling: SamplingParams
    ) -> AsyncGenerator[TokenEvent, None]:
        for number, event in enumerate(self._events(request_id, token_ids, sampling)):
            await self._wait(number)
            if number == 1 and self.failure is not None:
                raise self.failure
            yield event

    def _leave(self, request_id: str, finished: bool) -> None:
        del self._running[request_id]
        if not finished:
            self.aborted.append(request_id)

    async def _wait(self, number: int) -> None:
        await asyncio.sleep(self.seconds_per_event)
        while self.hold_after is not None and number >= self.hold_after and self.alive:
            await asyncio.sleep(POLL_SECONDS)
        self._steps += 1
        self._check_alive()

    def _check_alive(self) -> None:
        if self.dead_reason is not None:
            raise EngineDead(self.dead_reason)

    def _events(self, request_id: str, prompt: list[int], sampling: SamplingParams) -> Iterator[TokenEvent]:
        tokens, reason = self._answer(prompt, sampling)
        prompt_logprobs = None
        if sampling.prompt_logprobs is not None:
            prompt_logprobs = self._logprobs([], prompt, sampling.prompt_logprobs)[1:]
        entries = None if sampling.logprobs is None else self._logprobs(prompt, tokens, sampling.logprobs)
        for start in range(0, len(tokens), self.tokens_per_event):
            end = min(start + self.tokens_per_event, len(tokens))
            last = end == len(tokens)
            yield TokenEvent(
                request_id=request_id,
                token_ids=tokens[start:end],
                finish_reason=reason if last else None,
                stop_token=tokens[-1] if last and reason == "stop" else None,
                logprobs=None if entries is None else entries[start:end],
                prompt_logprobs=prompt_logprobs if start == 0 else None,
                num_cached_tokens=0 if start else len(prompt) // 2,
            )

    def _answer(self, prompt: list[int], sampling: SamplingParams) -> tuple[list[int], FinishReason]:
        """All tokens of an answer and why it ends."""
        assert sampling.max_tokens is not None
        ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.eos_token_ids)}
        answer: list[int] = []
        for token in self._tokens(prompt, sampling, ends):
            answer.append(token)
            if token in ends and len(answer) > sampling.min_tokens:
                return answer, "stop"
            if len(answer) == sampling.max_tokens:
                return answer, "length"
        raise RequestError("the test's script is too short")

    def _tokens(self, prompt: list[int], sampling: SamplingParams, ends: set[int]) -> Iterator[int]:
        if self.script is not None:
            yield from self.script(prompt, sampling)
            return
        forced = [token for token, bias in sampling.logit_bias.items() if bias == FORCING_BIAS]
        past = NOTHING
        for token in prompt:
            past = absorb(past, token)
        number = 0
        while True:
            banned = ends if number < sampling.min_tokens else set()
            seed = None if sampling.greedy else sampling.seed
            token = choose(past, seed=seed, banned=banned, vocab_size=self.vocab_size)
            yield forced[0] if forced else token
            past = absorb(past, forced[0] if forced else token)
            number += 1

    def _logprobs(self, past: list[int], tokens: list[int], num_top: int) -> list[TokenLogprob]:
        """Made up; the chosen token is the likeliest, the next ids follow."""
        return [
            TokenLogprob(
                token,
                -1.0 - place % 3,
                1,
                [((token + rank) % self.vocab_size, -1.0 - place % 3 - rank) for rank in range(num_top)],
            )
            for place, token in enumerate(tokens, start=len(past))
        ]
