"""From a checked body to what an engine can take: ids that fit, settled sampling, the pinned rank. RequestErrors."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from moe_serve.api.logprobs import Echo
from moe_serve.api.schemas import ChatBody, CompletionBody
from moe_serve.base.errors import ContextTooLong, RequestError, shown
from moe_serve.base.sampling import SamplingParams
from moe_serve.engine.admission import guess_tokens
from moe_serve.text.chat_template import ChatPrompt
from moe_serve.text.tokenizer import Tokenizer

INLINE_CHARACTERS = 4096  # longer texts are encoded in a thread, so that they hold up nobody else's stream

BEGINNING_CHARACTERS = 16
"""Of a text that may be too long, so many characters for each token that fits are encoded first."""
BEGINNINGS_RATIO = 4
"""The next beginning is so many times as long; all of them together cost a third of the whole at most."""


async def encode_all(tokenizer: Tokenizer, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    def encode() -> list[list[int]]:
        return [tokenizer.encode(text, add_special_tokens) for text in texts]

    if sum(map(len, texts)) <= INLINE_CHARACTERS:
        return encode()
    return await asyncio.to_thread(encode)


async def completion_prompts(tokenizer: Tokenizer, body: CompletionBody, max_model_len: int) -> list[list[int]]:
    """The ids of each prompt; ContextTooLong, before anything is encoded, for a text that cannot fit."""
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    for text in texts:
        await check_fits(tokenizer, text, max_model_len, "prompt")
    encoded = iter(await encode_all(tokenizer, texts, add_special_tokens=body.add_special_tokens is not False))
    return [next(encoded) if isinstance(prompt, str) else prompt for prompt in body.prompt]


async def chat_ids(
    tokenizer: Tokenizer, prompt: ChatPrompt, max_model_len: int | None = None, *, add_special_tokens: bool = False
) -> list[int]:
    """The ids of a conversation; the template writes the special tokens itself, unless more are asked for."""
    if max_model_len is not None:
        await check_fits(tokenizer, prompt.text, max_model_len, "messages")

    def encode() -> list[int]:
        return tokenizer.encode_chat(prompt, add_special_tokens)

    return encode() if len(prompt.text) <= INLINE_CHARACTERS else await asyncio.to_thread(encode)


def num_prompts(body: CompletionBody | ChatBody) -> int:
    return len(body.prompt) if isinstance(body, CompletionBody) else 1


def guess(body: CompletionBody | ChatBody) -> int:
    """About how many prompt tokens a body brings, told without a tokenizer."""
    if isinstance(body, CompletionBody):
        return sum(guess_tokens(len(each)) if isinstance(each, str) else len(each) for each in body.prompt)
    return sum(guess_tokens(len(text)) for message in body.messages for text in _texts(message.get("content")))


def _texts(content: object) -> list[str]:
    """The texts of a message, which is text or a list of parts."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts]
    return [text for text in texts if isinstance(text, str)]


def echo_of(tokenizer: Tokenizer, prompt: str | list[int], token_ids: list[int], skip_special_tokens: bool) -> Echo:
    """What `echo` puts in front of an answer: the prompt as given, or its ids as text."""
    if not isinstance(prompt, str):
        text = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return Echo(text, token_ids, skip_special_tokens)
    # Special tokens that the client wrote are part of its text, those that were added for it are not.
    written = tokenizer.decode(token_ids, skip_special_tokens=False) == prompt
    return Echo(prompt, token_ids, skip_special_tokens=not written)


async def check_fits(tokenizer: Tokenizer, text: str, max_model_len: int, param: str) -> None:
    """Refuse a text that is too long by its length, or else by its beginning.

    Encoding megabytes takes seconds to minutes and a hundred bytes for each token. Not every tokenizer has a longest
    token, so ever longer beginnings are encoded. Where a beginning is cut may cost it a few tokens, never half of them.
    """
    least = tokenizer.least_tokens(text)
    length = BEGINNING_CHARACTERS * max_model_len
    while least < max_model_len and length < len(text) // BEGINNINGS_RATIO:
        (ids,) = await encode_all(tokenizer, [text[:length]], add_special_tokens=False)
        least = len(ids) // 2
        length *= BEGINNINGS_RATIO
    if least >= max_model_len:
        raise ContextTooLong(
            f"the prompt has {len(text)} characters, which is at least {least} tokens: more than the {max_model_len} "
            "tokens this model is served with (server option --max-model-len)",
            param=param,
        )


def settled(
    sampling: SamplingParams, num_prompt: int, max_model_len: int, *, param: str, limit_param: str
) -> SamplingParams:
    """`sampling` with a max_tokens that fits; ContextTooLong says both numbers."""
    room = max_model_len - num_prompt
    wanted = sampling.max_tokens
    if room < 1 or (wanted is not None and wanted > room):
        asked = "at least 1 token of answer was asked for" if wanted is None else f"{limit_param} is {wanted}"
        raise ContextTooLong(
            f"the prompt has {num_prompt} tokens and {asked}: together more than the {max_model_len} tokens this "
            "model is served with (server option --max-model-len)",
            param=param if room < 1 else limit_param,
        )
    return sampling if wanted is not None else msgspec.structs.replace(sampling, max_tokens=room)


def check_prompt(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """A prompt must be something, and an id outside the vocabulary must never reach an engine."""
    if not token_ids:
        raise RequestError("the prompt is empty: at least one token is needed", param=param)
    check_ids(token_ids, vocab_size, param)


def check_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    low, high = min(token_ids, default=0), max(token_ids, default=0)
    if low < 0 or high >= vocab_size:
        wrong = shown(low if low < 0 else high)
        raise RequestError(f"{param}: token id {wrong} is outside [0, {vocab_size})", param=param)


def check_sampling_ids(sampling: SamplingParams, vocab_size: int) -> None:
    for name in ("logit_bias", "stop_token_ids"):
        for token_id in getattr(sampling, name):
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"{name} has token id {token_id}, outside [0, {vocab_size})", param=name)


def pinned_rank(value: str | None, size: int, header: str) -> int | None:
    """The DP rank a client asks for."""
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) < 10 and int(value) < size):
        raise RequestError(f"{header} must be a data-parallel rank in [0, {size}), not {value[:80]!r}", param=header)
    return int(value)
