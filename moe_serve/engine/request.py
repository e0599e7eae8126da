"""One request's life inside an engine: its tokens, its blocks, how far it is computed, and why it ended."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from moe_serve.base.commands import NewRequest, Sampled, TokenLogprob
from moe_serve.base.engine_messages import FinishReason, TokenEvent
from moe_serve.base.errors import ContextTooLong, EngineError, RequestError
from moe_serve.base.sampling import SamplingParams


class State(enum.Enum):
    WAITING = "waiting"  # holds no blocks; the workers do not know it
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """`token_ids` prompt and answer so far; `stop_ids` the tokens that end it; at `max_total` it ends anyway.

    `sent_tokens`, `sent_blocks`: how many the workers know. `num_cached`: prompt tokens found in the prefix
    cache when it first ran. `chain`: the names of its full blocks (see block_pool), `num_published` of them
    shared. `prompt_logprobs`: what the workers gave so far; None if not asked for or already passed on.
    `group`: the HTTP request it is part of (see turns). `last_turn`: when it was last given tokens.
    """

    request_id: str
    group: str
    token_ids: list[int]
    num_prompt: int
    sampling: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    max_total: int
    state: State = State.WAITING
    finish_reason: FinishReason | None = None
    num_computed: int = 0
    num_cached: int | None = None
    blocks: list[int] = field(default_factory=list)
    chain: list[bytes] = field(default_factory=list)
    num_published: int = 0
    sent_tokens: int = 0
    sent_blocks: int = 0
    prompt_logprobs: list[TokenLogprob] | None = None
    last_turn: int = 0

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    def append(self, token_id: int) -> FinishReason | None:
        """Take the next token; says why the request ends with it, if it does."""
        self.token_ids.append(token_id)
        if token_id in self.stop_ids and self.num_generated > self.sampling.min_tokens:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_total else None

    def advance(self, sampled: Sampled | None) -> TokenEvent:
        """Append the sampled token, with whatever was waiting for it. EngineError if the workers left something out."""
        if sampled is None:
            raise EngineError(f"the workers gave no next token for request {self.request_id}")
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        if prompt_logprobs is not None and len(prompt_logprobs) != self.num_prompt - 1:
            raise EngineError(
                f"the workers gave {len(prompt_logprobs)} prompt logprobs for request {self.request_id}, "
                f"not {self.num_prompt - 1}"
            )
        if sampled.logprob is None and self.sampling.logprobs is not None:
            raise EngineError(f"the workers gave no logprob for request {self.request_id}")
        reason = self.append(sampled.token_id)
        return TokenEvent(
            request_id=self.request_id,
            token_ids=[sampled.token_id],
            finish_reason=reason,
            stop_token=sampled.token_id if reason == "stop" else None,
            logprobs=None if sampled.logprob is None else [sampled.logprob],
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self.num_cached or 0,
        )

    def rewind(self) -> None:
        """Back to waiting: nothing computed or known to the workers. Its blocks are released already."""
        self.state = State.WAITING
        self.blocks = []
        self.num_computed = self.num_published = self.sent_tokens = self.sent_blocks = 0
        if self.prompt_logprobs is not None:
            self.prompt_logprobs = []  # the whole prompt is computed again and gives them again

    def as_new(self) -> NewRequest:
        """All the workers must know; lists are copied, since a worker in this process keeps what it gets."""
        return NewRequest(
            request_id=self.request_id,
            token_ids=self.token_ids.copy(),
            num_prompt_tokens=self.num_prompt,
            block_ids=self.blocks.copy(),
            sampling=self.sampling,
            sampling_seed=self.seed,
            stop_ids=sorted(self.stop_ids),
        )


def make_request(
    request_id: str,
    token_ids: list[int],
    sampling: SamplingParams,
    *,
    max_model_len: int,
    eos_token_ids: Collection[int],
    draw_seed: Callable[[], int],
    group: str = "",
) -> Request:
    """A waiting request; without a `group` it is one of its own.

    With ignore_eos an eos id is a token like any other, also for min_tokens.
    """
    limit = max_model_len if sampling.max_tokens is None else len(token_ids) + sampling.max_tokens
    return Request(
        request_id=request_id,
        group=group or request_id,
        token_ids=list(token_ids),
        num_prompt=len(token_ids),
        sampling=sampling,
        seed=draw_seed() if sampling.seed is None else sampling.seed,
        stop_ids=frozenset(sampling.stop_token_ids) | frozenset(() if sampling.ignore_eos else eos_token_ids),
        max_total=min(limit, max_model_len),
        prompt_logprobs=None if sampling.prompt_logprobs is None else [],
    )


def check_request(
    token_ids: list[int],
    sampling: SamplingParams,
    *,
    max_model_len: int,
    vocab_size: int,
    eos_token_ids: Collection[int],
) -> None:
    """RequestError for what no engine of this model could serve."""
    if not token_ids:
        raise RequestError("the prompt must have at least one token", param="prompt")
    if len(token_ids) + 1 > max_model_len:
        raise ContextTooLong(
            f"the prompt has {len(token_ids)} tokens, which leaves no room for an answer within the "
            f"context of {max_model_len} tokens (--max-model-len)",
            param="prompt",
        )
    _check_vocabulary("prompt", token_ids, vocab_size)
    _check_vocabulary("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_vocabulary("logit_bias", sampling.logit_bias, vocab_size)
    if sampling.min_tokens and len({*sampling.stop_token_ids, *eos_token_ids}) >= vocab_size:
        raise RequestError(
            "stop_token_ids holds the whole vocabulary, which min_tokens bans: no token would be left",
            param="stop_token_ids",
        )


def _check_vocabulary(param: str, token_ids: Collection[int], vocab_size: int) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        outside = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise RequestError(f"{param} holds token id {outside}, outside the vocabulary [0, {vocab_size})", param=param)
