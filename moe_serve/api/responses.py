"""Token events -> response bodies and server-sent events, for completions and chat. Both are made from the same
deltas, so a streamed answer and a whole one cannot differ."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from moe_serve.api.errors import problem_of
from moe_serve.api.generation import Delta, GrowingAnswer, GrowingSequence
from moe_serve.api.logprobs import CompletionLogprobs, Echo, chat_logprobs
from moe_serve.api.schemas import StreamedUsage
from moe_serve.base.errors import MoEServeError
from moe_serve.text.tokenizer import Tokenizer

Json = dict[str, Any]
INLINE_LOGPROBS = 32
DONE = b"data: [DONE]\n\n"
_LINE_ENDS = [(end.encode(), f"\\u{ord(end):04x}".encode()) for end in "\u0085\u2028\u2029"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Heading:
    """What every body and chunk of a response repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self, kind: str) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


@dataclass(slots=True)
class Part:
    """A delta in the words of an API: text, and its log-probabilities as lists that can be joined."""

    index: int
    text: str
    first: bool
    logprobs: dict[str, list[Any]] | None
    finish_reason: str | None


class Form(Protocol):
    """One of the two shapes of an answer."""

    heading: Heading

    def part(self, delta: Delta) -> Part: ...

    def chunks(self, part: Part) -> list[Json]:
        """A part as choices of streamed chunks, one per chunk."""
        ...

    def choice(self, whole: Part) -> Json:
        """A finished choice of a body."""
        ...

    @property
    def body_object(self) -> str: ...

    @property
    def chunk_object(self) -> str: ...


@dataclass(slots=True)
class CompletionForm:
    """`echo` by choice index, empty where it was not asked for."""

    heading: Heading
    tokenizer: Tokenizer
    logprobs: int | None
    echo: Mapping[int, Echo] = field(default_factory=dict)
    body_object = "text_completion"
    chunk_object = "text_completion"

    def part(self, delta: Delta) -> Part:
        echo = self.echo.get(delta.index)
        echoed = "" if echo is None else echo.text
        text = echoed + delta.text if delta.first else delta.text
        made: CompletionLogprobs | None = None
        if self.logprobs is not None:
            made = CompletionLogprobs(self.tokenizer, self.logprobs)
            if delta.first and echo is not None:
                made.add_prompt(echo, delta.prompt_logprobs or [])
            made.add(delta.logprobs or [], len(echoed))
        fields = None if made is None else made.fields()
        return Part(delta.index, text, delta.first, fields, delta.finish_reason)

    def chunks(self, part: Part) -> list[Json]:
        has_logprobs = part.logprobs is not None and bool(part.logprobs["tokens"])
        if not (part.text or has_logprobs or part.finish_reason):
            return []
        return [self.choice(part)]

    def choice(self, whole: Part) -> Json:
        return {
            "index": whole.index,
            "text": whole.text,
            "logprobs": whole.logprobs,
            "finish_reason": whole.finish_reason,
        }


@dataclass(slots=True)
class ChatForm:
    heading: Heading
    tokenizer: Tokenizer
    logprobs: int | None
    body_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def part(self, delta: Delta) -> Part:
        fields = None
        if self.logprobs is not None:
            entries = [entry for entry, _ in delta.logprobs or []]
            fields = {"content": chat_logprobs(self.tokenizer, entries, self.logprobs)}
        return Part(delta.index, delta.text, delta.first, fields, delta.finish_reason)

    def chunks(self, part: Part) -> list[Json]:
        """The role by itself, then text, then the reason by itself, as OpenAI sends them."""
        made = []
        if part.first:
            made.append(self._chunk(part, {"role": "assistant", "content": "", "refusal": None}))
        has_logprobs = part.logprobs is not None and bool(part.logprobs["content"])
        if part.text or has_logprobs:
            made.append(self._chunk(part, {"content": part.text}, logprobs=_chat_fields(part.logprobs)))
        if part.finish_reason:
            made.append(self._chunk(part, {}, finish_reason=part.finish_reason))
        return made

    def _chunk(self, part: Part, delta: Json, **more: object) -> Json:
        return {"index": part.index, "delta": delta, "logprobs": None, "finish_reason": None, **more}

    def choice(self, whole: Part) -> Json:
        return {
            "index": whole.index,
            "message": {"role": "assistant", "content": whole.text, "refusal": None},
            "logprobs": _chat_fields(whole.logprobs),
            "finish_reason": whole.finish_reason,
        }


def _chat_fields(logprobs: dict[str, list[Any]] | None) -> Json | None:
    return None if logprobs is None else {**logprobs, "refusal": None}


async def whole_body(answer: GrowingAnswer, form: Form) -> bytes:
    """The JSON body of an answer that is not streamed."""
    wholes: dict[int, Part] = {}
    texts: dict[int, list[str]] = {}
    async for delta in answer.deltas():
        part = await _part(form, delta)
        texts.setdefault(part.index, []).append(part.text)
        whole = wholes.setdefault(part.index, part)
        if whole is not part:
            _join(whole, part)
    for index, whole in wholes.items():
        whole.text = "".join(texts[index])
    choices = []
    for index in sorted(wholes):
        # One at a time: thousands of prompts with log-probabilities are megabytes, and others' streams go on between.
        choices.append(msgspec.Raw(msgspec.json.encode(form.choice(wholes.pop(index)))))
        await asyncio.sleep(0)
    body = form.heading.fields(form.body_object) | {"choices": choices, "usage": whole_usage(answer.choices)}
    return msgspec.json.encode(body)


async def _part(form: Form, delta: Delta) -> Part:
    """Log-probabilities of a long prompt are written in a thread, so that they hold up nobody else's stream."""
    if len(delta.prompt_logprobs or ()) <= INLINE_LOGPROBS:
        return form.part(delta)
    return await asyncio.to_thread(form.part, delta)


def _join(whole: Part, part: Part) -> None:
    whole.finish_reason = part.finish_reason
    if whole.logprobs is not None and part.logprobs is not None:
        for name, values in part.logprobs.items():
            whole.logprobs[name] += values


async def event_stream(answer: GrowingAnswer, form: Form, *, usage: StreamedUsage) -> AsyncIterator[bytes]:
    """Server-sent events. A failure ends the stream with an event that holds the error, and without [DONE]."""
    heading = form.heading.fields(form.chunk_object)
    usage_field: Json = {} if usage == "none" else {"usage": None}
    running = RunningUsage(answer.choices)
    try:
        async for delta in answer.deltas():
            if usage == "all":
                usage_field = {"usage": running.after(delta)}
            for choice in form.chunks(await _part(form, delta)):
                yield event(heading | {"choices": [choice]} | usage_field)
    except Exception as error:
        # Also a bug of ours: the status is long sent, so this event is the only way to say that the text ends here.
        if not isinstance(error, MoEServeError):
            log.exception("a stream failed")
        yield event(dict(problem_of(error).body()))
        return
    if usage != "none":
        yield event(heading | {"choices": [], "usage": whole_usage(answer.choices)})
    yield DONE


def event(value: Json) -> bytes:
    """One server-sent event. Characters that some clients take for the end of a line are written as escapes."""
    encoded = msgspec.json.encode(value)
    for character, escape in _LINE_ENDS:
        encoded = encoded.replace(character, escape)
    return b"data: " + encoded + b"\n\n"


class RunningUsage:
    """Token counts of a request while its choices grow."""

    def __init__(self, choices: Sequence[GrowingSequence]) -> None:
        self._prompt_tokens = sum(len(choice.token_ids) for choice in _first_choices(choices))
        self._by_choice: dict[int, int] = {}
        self._completion_tokens = 0

    def after(self, delta: Delta) -> Json:
        """The counts, this delta included."""
        self._completion_tokens += delta.num_tokens - self._by_choice.get(delta.index, 0)
        self._by_choice[delta.index] = delta.num_tokens
        return _counts(self._prompt_tokens, self._completion_tokens)


def whole_usage(choices: Sequence[GrowingSequence]) -> Json:
    """Token counts in the end."""
    prompts = _first_choices(choices)
    counts = _counts(sum(len(choice.token_ids) for choice in prompts), sum(choice.num_tokens for choice in choices))
    return counts | {"prompt_tokens_details": {"cached_tokens": sum(choice.num_cached_tokens for choice in prompts)}}


def _first_choices(choices: Sequence[GrowingSequence]) -> list[GrowingSequence]:
    """One choice of each prompt: a prompt counts once however many choices it has."""
    return list({id(choice.token_ids): choice for choice in reversed(choices)}.values())


def _counts(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
