"""Whole answers for a Python caller, and how they are collected from the events of their sequences."""

from __future__ import annotations

from dataclasses import dataclass

from moe_serve.base.commands import TokenLogprob
from moe_serve.base.engine_messages import FinishReason, Generate, TokenEvent
from moe_serve.text.growing import GrowingText, Growth
from moe_serve.text.tokenizer import Tokenizer


@dataclass(slots=True)
class CompletionOutput:
    """One choice. `logprobs` one per token, if asked for; `stop_reason` the stop string or token that ended it.

    With finish_reason "error" the engine could not go on with it: `error` says why, and the text is what came before.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    logprobs: list[TokenLogprob] | None
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """What became of one prompt. `prompt` is None where token ids were given; `outputs` has n choices."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob] | None


class PendingCompletion:
    """One choice until it has ended: collects what GrowingText makes of its events."""

    def __init__(self, tokenizer: Tokenizer, request: Generate, index: int) -> None:
        self.request = request
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self._error: str | None = None
        self._growing = GrowingText(tokenizer, request.token_ids, request.sampling)
        self._growths: list[Growth] = []
        self._index = index

    def take(self, event: TokenEvent) -> bool:
        """Book an event; whether the choice has ended."""
        self._growths.append(self._growing.take(event))
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        if self._growing.finish_reason == "error":
            self._error = event.error or "the engine could not go on with this request"
        return self._growing.finish_reason is not None

    def output(self) -> CompletionOutput:
        """The finished choice."""
        growths = self._growths
        asked = self.request.sampling.logprobs is not None
        return CompletionOutput(
            index=self._index,
            text="".join(growth.text for growth in growths),
            token_ids=[token_id for growth in growths for token_id in growth.token_ids],
            finish_reason=self._growing.finish_reason,
            stop_reason=self._growing.stop_reason,
            logprobs=[entry for growth in growths for entry in growth.logprobs or []] if asked else None,
            error=self._error,
        )


@dataclass(slots=True)
class PendingOutput:
    """One prompt and its choices."""

    prompt: str | None
    token_ids: list[int]
    choices: list[PendingCompletion]

    def output(self) -> RequestOutput:
        outputs = [choice.output() for choice in self.choices]
        prompt_logprobs = next((choice.prompt_logprobs for choice in self.choices if choice.prompt_logprobs), None)
        return RequestOutput(self.prompt, self.token_ids, outputs, prompt_logprobs)
