"""Records between front-ends and engines. msgspec, no torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from moe_serve.base.commands import TokenLogprob
from moe_serve.base.sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class EngineHello(msgspec.Struct, frozen=True, kw_only=True, tag="engine_hello"):
    """An engine's first word to a front-end. `facts`: what runs where an option left the choice open, by option."""

    dp: int
    num_blocks: int
    block_size: int
    max_model_len: int
    facts: dict[str, str] = {}
    load_seconds: dict[str, float] = {}


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """One sequence to generate (n choices are n of these). `max_tokens` in `sampling` is already settled.

    Sequences of one `group` (an HTTP request) share one turn; without a group a sequence has a turn of its own.
    """

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    group: str = ""


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Forget these requests; unknown ones are ignored."""

    request_ids: list[str]


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """New tokens of one request; the last event has a `finish_reason`.

    `stop_token` the end token that finished it (it is the last of `token_ids`). `logprobs` one per token if asked
    for. `prompt_logprobs` for prompt tokens 1..n-1, once, with the first event. `error` with reason "error": why it
    was refused, or with `failed` why the engine could not go on.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    failed: bool = False

    @classmethod
    def of_failure(cls, request_id: str, why: str) -> TokenEvent:
        """The last event of a request that the engine could not go on with."""
        return cls(request_id=request_id, token_ids=[], finish_reason="error", error=why, failed=True)


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, tag="report", omit_defaults=True):
    """An engine's state, with its events and, as long as it is awake, every half second.

    Counters only grow, from the engine's start. `num_blocks` and `load_seconds` never change: an engine says them in
    its hello, and its front-end writes them in here.
    """

    step: int = 0
    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0
    free_blocks: int = 0
    num_blocks: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    steps: int = 0
    dummy_steps: int = 0
    naps: int = 0
    vote_seconds: float = 0.0
    votes: int = 0
    padding_tokens: int = 0
    all2all_seconds: float = 0.0
    load_seconds: dict[str, float] = {}


class Events(msgspec.Struct, frozen=True, tag="events"):
    """What one step gave a front-end, and how the engine stands now."""

    dp: int
    events: list[TokenEvent]
    report: LoadReport


class HeldAsk(msgspec.Struct, frozen=True, tag="held_ask"):
    """Which of these do you still have? Answered after everything that was said before on the same line."""

    number: int
    request_ids: list[str]


class HeldAnswer(msgspec.Struct, frozen=True, kw_only=True, tag="held_answer"):
    """All of question `number` but the `unknown` ones. `computed` counts the engine's steps that were not dummies."""

    dp: int
    number: int
    unknown: list[str]
    computed: int


ToEngine = Generate | Abort | HeldAsk
FromEngine = EngineHello | Events | HeldAnswer
