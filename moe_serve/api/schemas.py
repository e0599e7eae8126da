"""What clients may send: OpenAI's completions and chat bodies, the usual extensions, and /tokenize.

Rules for fields: those without a meaning here (user, store, metadata, ...) are accepted; those that would change the
answer and are not built are refused by name unless they hold a neutral value (api/known_fields.py); unknown ones are
named in a warning, or refused with --strict-fields (api/unknown_fields.py). null means "not given". Types are strict:
"5" is no number. All failures are RequestErrors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json
from starlette.requests import Request

from moe_serve.api.known_fields import asks_for_nothing, check_neutral, is_known
from moe_serve.api.messages import checked_messages, checked_tools
from moe_serve.api.unknown_fields import UnknownFields
from moe_serve.api.values import as_bias, as_prompts, as_stops, false_is_none, zero_is_false
from moe_serve.base.errors import NotJson, RequestError, shown
from moe_serve.base.sampling import DEFAULTED, SamplingParams, with_defaults

MAX_SEQUENCES = 2048  # prompts x n of one request
DEFAULT_COMPLETION_TOKENS = 16
INLINE_BYTES = 2**17  # a larger body is read in a thread, so that it holds up nobody else's stream

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Ids = Annotated[list[Int64], Field(fail_fast=True)]  # an error for each of a million items is a gigabyte
Prompt = str | list[int]
StreamedUsage = Literal["none", "last", "all"]


class _Fields(BaseModel):
    """An object of a request; fields that it does not declare are kept aside."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    def unknown_fields(self) -> list[str]:
        """Names of fields that nobody knows, those of inner objects with the object's name in front."""
        names = [name for name in self.model_extra or {} if not self._knows(name)]
        for name in type(self).model_fields:
            inner = getattr(self, name)
            if isinstance(inner, _Fields):
                names += [f"{name}.{each}" for each in inner.unknown_fields()]
        return names

    def _knows(self, name: str) -> bool:
        return False


class _Body(_Fields):
    @model_validator(mode="after")
    def _known_fields_ask_for_nothing(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if is_known(name):
                check_neutral(name, value)
        return self

    def _knows(self, name: str) -> bool:
        return is_known(name)


class StreamOptions(_Fields):
    """`continuous_usage_stats` puts the token counts so far into every chunk; it needs include_usage."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
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
    def streamed_usage(self) -> StreamedUsage:
        """Which chunks of a stream have token counts."""
        options = self.stream_options
        if options is None or not options.include_usage:
            return "none"
        return "all" if options.continuous_usage_stats else "last"

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.streamed_usage != "none" and not self.stream:
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
        others = ("n", "seed", "include_stop_str_in_output", "min_tokens", "ignore_eos", "skip_special_tokens")
        given = {name: getattr(self, name) for name in (*DEFAULTED, "frequency_penalty", *others)}
        return with_defaults(
            defaults,
            **{name: value for name, value in given.items() if value is not None},
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
    logprobs: Annotated[Int64 | None, BeforeValidator(false_is_none)] = None
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
    logprobs: Annotated[bool | None, BeforeValidator(zero_is_false)] = None
    top_logprobs: Annotated[Int64 | None, BeforeValidator(false_is_none)] = None
    tools: Annotated[list[dict[str, Any]] | None, BeforeValidator(checked_tools)] = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _rules(self) -> Self:
        check_neutral("tool_choice", self.tool_choice)
        if self.top_logprobs and not self.logprobs:
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
            if self.prompt is not None and not asks_for_nothing(getattr(self, name), ([], {})):
                raise RequestError(f"{name} needs messages", param=name)
        return self


class DetokenizeBody(_Body):
    model: str | None = None
    tokens: Ids


Body = TypeVar("Body", bound=_Body)


async def read_body(kind: type[Body], request: Request, unknown: UnknownFields) -> Body:
    """A request's body as `kind`; what becomes of its unknown fields is up to `unknown`.

    A body of another declared type is refused: a web page of a stranger may send a form or plain text to a server on
    this machine without asking, JSON it may not.
    """
    check_is_json(request.headers.get("content-type", "application/json"))
    content = await request.body()
    small = len(content) <= INLINE_BYTES
    body = parse(kind, content) if small else await asyncio.to_thread(parse, kind, content)
    unknown.meet("unknown" if request.client is None else request.client.host, body.unknown_fields())
    return body


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
        problem = _first_problem(error)
    # The error above may hold this one, and so does this frame: circles that would keep the body until they are found.
    try:
        raise problem
    finally:
        del problem


def _first_problem(error: ValidationError) -> RequestError:
    problem = error.errors(include_url=False)[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return cause
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return RequestError(f"{name} is required", param=name)
    return RequestError(f"{name}: {problem['msg']}, not {shown(problem['input'])}", param=name[:200])
