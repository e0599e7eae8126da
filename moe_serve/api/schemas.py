"""What clients may send: OpenAI's completions and chat bodies, the usual extensions, and /tokenize.

Rules for fields: those without a meaning here (user, store, metadata, ...) are accepted; those that would change the
answer and are not built are refused by name unless they hold their neutral value; unknown fields are refused by name,
as OpenAI does. null means "not given". Types are strict: "5" is no number. All failures are RequestErrors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json
from starlette.requests import Request

from moe_serve.api.messages import checked_messages, checked_tools
from moe_serve.api.values import as_bias, as_prompts, as_stops, shown
from moe_serve.base.errors import NotJson, RequestError
from moe_serve.base.sampling import SamplingParams

MAX_SEQUENCES = 2048  # prompts x n of one request
DEFAULT_COMPLETION_TOKENS = 16
INLINE_BYTES = 2**17  # a larger body is read in a thread, so that it holds up nobody else's stream

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Ids = Annotated[list[Int64], Field(fail_fast=True)]  # an error for each of a million items is a gigabyte
Prompt = str | list[int]
Body = TypeVar("Body", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # hides lengths from onlookers; has no meaning here


class GenerationBody(_Body):
    """What completions and chat share. What is None was not given and gets the model's or OpenAI's default."""

    model: str | None = None
    max_tokens: Int64 | None = None
    n: Int64 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    min_p: float | None = None
    seed: Int64 | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(as_bias)] = {}
    stop: Annotated[tuple[str, ...], BeforeValidator(as_stops)] = ()
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Int64 | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted, without effect on an answer.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
        return self

    def _sampling(
        self,
        defaults: Mapping[str, float],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> SamplingParams:
        """The record for one engine request; `defaults` are the checkpoint's for what the client left out."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
        others = ("frequency_penalty", "n", "seed", "include_stop_str_in_output", "min_tokens", "ignore_eos")
        given = {name: getattr(self, name) for name in (*names, *others, "skip_special_tokens")}
        values: dict[str, Any] = {name: defaults[name] for name in names if name in defaults}
        values |= {name: value for name, value in given.items() if value is not None}
        values["top_k"] = int(values.get("top_k", 0))
        return SamplingParams(
            **values,
            logit_bias=self.logit_bias,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class CompletionBody(GenerationBody):
    prompt: Annotated[list[Prompt], BeforeValidator(as_prompts)]
    echo: bool | None = None
    logprobs: Int64 | None = None
    add_special_tokens: bool | None = None
    # Known; only their neutral values are built.
    suffix: str | None = None
    best_of: Int64 | None = None

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.suffix:
            raise RequestError("suffix is not supported", param="suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError(
                f"best_of ({self.best_of}) other than n ({self.n or 1}) is not supported", param="best_of"
            )
        if len(self.prompt) * (self.n or 1) > MAX_SEQUENCES:
            raise RequestError(
                f"{len(self.prompt)} prompts x n {self.n or 1} are more than {MAX_SEQUENCES} answers", param="prompt"
            )
        return self

    @property
    def only_scores(self) -> bool:
        """max_tokens 0 with echo: the prompt's log-probabilities and nothing more."""
        return self.max_tokens == 0 and bool(self.echo)

    def to_sampling(self, defaults: Mapping[str, float]) -> SamplingParams:
        limit = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return self._sampling(
            defaults,
            max_tokens=1 if self.only_scores else limit,  # an engine makes at least one token
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
        )


class ChatBody(GenerationBody):
    messages: Annotated[list[dict[str, Any]], BeforeValidator(checked_messages)]
    max_completion_tokens: Int64 | None = None
    logprobs: bool | None = None
    top_logprobs: Int64 | None = None
    tools: Annotated[list[dict[str, Any]] | None, BeforeValidator(checked_tools)] = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Known; only their neutral values are built.
    response_format: Any = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    moderation: Any = None

    @model_validator(mode="after")
    def _rules(self) -> Self:
        for name, neutral in _NEUTRAL.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                allowed = f"; allowed: {', '.join(map(shown, neutral))}" if neutral else ""
                raise RequestError(f"{name} {shown(value)} is not supported{allowed}", param=name)
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        return self

    def to_sampling(self, defaults: Mapping[str, float]) -> SamplingParams:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._sampling(
            defaults,
            max_tokens=limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=None,
        )


# Field -> the values under which leaving it out would give the same answer.
_NEUTRAL: Mapping[str, Sequence[object]] = {
    "tool_choice": ("auto", "none"),
    "response_format": ({"type": "text"},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "moderation": (),
}


class TokenizeBody(_Body):
    """A prompt, or messages as chat would render them."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]] | None, BeforeValidator(checked_messages)] = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[dict[str, Any]] | None, BeforeValidator(checked_tools)] = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        for name in ("add_generation_prompt", "chat_template_kwargs", "tools"):
            if self.prompt is not None and getattr(self, name) is not None:
                raise RequestError(f"{name} needs messages", param=name)
        return self


class DetokenizeBody(_Body):
    model: str | None = None
    tokens: Ids


async def read_body(kind: type[Body], request: Request) -> Body:
    """A request's body as `kind`.

    A body of another declared type is refused: a web page of a stranger may send a form or plain text to a server on
    this machine without asking, JSON it may not.
    """
    check_is_json(request.headers.get("content-type", "application/json"))
    body = await request.body()
    if len(body) <= INLINE_BYTES:
        return parse(kind, body)
    return await asyncio.to_thread(parse, kind, body)


def check_is_json(declared: str) -> None:
    """Raise NotJson for another Content-Type."""
    if declared.partition(";")[0].strip().lower() != "application/json":
        raise NotJson(f"the body must be JSON (header Content-Type: application/json), not {shown(declared)}")


def parse(kind: type[Body], body: bytes) -> Body:
    """A request body as `kind`; RequestError naming the field otherwise."""
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(f"the body must be a JSON object, not {shown(values)}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _first_problem(error) from error


def _first_problem(error: ValidationError) -> RequestError:
    problem = error.errors(include_url=False)[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return cause
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return RequestError(f"unrecognized field: {shown(name)}", param=name[:200])
    if problem["type"] == "missing":
        return RequestError(f"{name} is required", param=name)
    return RequestError(f"{name}: {problem['msg']}, not {shown(problem['input'])}", param=name[:200])
