"""One HTTP request's sequences at the engines: their events as text, merged in order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from moe_serve.api.metrics import RequestClock
from moe_serve.base.commands import TokenLogprob
from moe_serve.base.engine_messages import TokenEvent
from moe_serve.base.errors import EngineDead, EngineError, RequestFailed
from moe_serve.base.sampling import SamplingParams
from moe_serve.engine.admission import Place
from moe_serve.engine.streams import AsyncEngines, SequenceStream
from moe_serve.text.growing import GrowingText
from moe_serve.text.tokenizer import Tokenizer

SUBMITTED_AT_A_TIME = 32
"""Sequences of one request that are sent before others' streams get their turn."""


@dataclass(slots=True)
class Delta:
    """News of one choice: text, and where it was asked for, log-probabilities of tokens with their text offsets.

    `num_tokens` of the choice up to here; its sequence may be further.
    """

    index: int
    text: str
    first: bool
    num_tokens: int = 0
    logprobs: list[tuple[TokenLogprob, int]] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: Literal["stop", "length"] | None = None


class GrowingSequence:
    """One sequence: what was asked and how far it is. `discard` drops what is generated (only the prompt counts)."""

    def __init__(
        self,
        *,
        index: int,
        request_id: str,
        token_ids: list[int],
        sampling: SamplingParams,
        tokenizer: Tokenizer,
        clock: RequestClock,
        discard: bool = False,
    ) -> None:
        self.index = index
        self.request_id = request_id
        self.token_ids = token_ids
        self.sampling = sampling
        self.clock = clock
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finished = False
        self._discard = discard
        self._began = False
        self._growing = GrowingText(tokenizer, token_ids, sampling)

    def take(self, event: TokenEvent, rank: int) -> Delta:
        """What an event from DP rank `rank` means for the client; RequestFailed or EngineError if it means failure."""
        if event.finish_reason == "error":
            raise RequestFailed(event.error or "the engine could not go on with this request")
        if event.finish_reason == "abort":
            raise EngineError("the server ended this request before it was finished")
        growth = self._growing.take(event)
        ended = self._growing.finish_reason
        self.finished = ended is not None
        self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached_tokens)
        self.clock.tokens(len(growth.token_ids), rank)
        delta = Delta(self.index, growth.text, not self._began, prompt_logprobs=event.prompt_logprobs)
        self._began = True
        if ended is not None:
            delta.finish_reason = "stop" if ended == "stop" else "length"
        if self._discard:
            delta.text = ""
            return delta
        self.num_tokens += len(growth.token_ids)
        delta.num_tokens = self.num_tokens
        if growth.logprobs is not None:
            delta.logprobs = list(zip(growth.logprobs, growth.offsets, strict=False))
        return delta


class GrowingAnswer:
    """All choices of a request, a `group` at the engines. Iterate once for their deltas.

    `aclose()` aborts what is unfinished and gives the request's `place` back.
    """

    def __init__(
        self,
        engines: AsyncEngines,
        choices: Sequence[GrowingSequence],
        *,
        dp_rank: int | None,
        place: Place,
        group: str,
    ) -> None:
        self.choices = choices
        self._place = place
        self._group = group
        self._engines = engines
        self._dp_rank = dp_rank
        # Bounded: a client that reads slowly slows its own choices' pumps, nothing else.
        self._news: asyncio.Queue[Delta | Exception] = asyncio.Queue(maxsize=4 * len(choices) + 4)
        self._streams: list[SequenceStream] = []
        self._pumps: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Submit everything; raises at once what the engines refuse at once, and then leaves nothing behind."""
        for number, choice in enumerate(self.choices, 1):
            try:
                if number % SUBMITTED_AT_A_TIME == 0:
                    await asyncio.sleep(0)
                stream = await self._engines.submit(
                    choice.request_id, choice.token_ids, choice.sampling, dp_rank=self._dp_rank, group=self._group
                )
            except BaseException as error:
                choice.clock.end("error" if isinstance(error, Exception) else "abort")
                await self.aclose()
                raise
            self._streams.append(stream)
        pairs = zip(self.choices, self._streams, strict=True)
        self._pumps = [asyncio.create_task(self._pump(choice, stream)) for choice, stream in pairs]

    @property
    def ranks(self) -> list[int]:
        """The DP ranks that serve this request."""
        return sorted({stream.rank for stream in self._streams})

    async def deltas(self) -> AsyncIterator[Delta]:
        """News of all choices until each has finished; raises the first failure."""
        unfinished = len(self.choices)
        while unfinished:
            news = await self._news.get()
            if isinstance(news, Exception):
                raise news
            unfinished -= news.finish_reason is not None
            yield news

    async def aclose(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        # A pump that is cancelled before its first turn has closed nothing.
        await asyncio.gather(*(stream.aclose() for stream in self._streams), return_exceptions=True)
        for choice in self.choices:
            choice.clock.end("abort")  # unless it ended some other way before
        self._place.close()

    async def _pump(self, choice: GrowingSequence, stream: SequenceStream) -> None:
        try:
            async with aclosing(stream):
                await self._follow(choice, stream)
        except Exception as error:  # noqa: BLE001 (the outermost loop of a task: whoever waits for it must hear)
            choice.clock.end("error")
            await self._news.put(error)

    async def _follow(self, choice: GrowingSequence, stream: SequenceStream) -> None:
        began = False
        async for event in stream:
            delta = choice.take(event, stream.rank)
            if not began:
                began = True
                self._place.began(len(choice.token_ids))
            if delta.finish_reason is not None:
                choice.clock.end(delta.finish_reason)
                self._place.finished()
            await self._news.put(delta)
            if choice.finished:
                return
        raise EngineDead("the engine ended an answer without a reason")
