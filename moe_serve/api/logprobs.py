"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_serve.base.commands import TokenLogprob
from moe_serve.text.detokenizer import IncrementalDetokenizer
from moe_serve.text.tokenizer import Tokenizer

LEAST = -9999.0  # JSON knows no infinity; OpenAI's own stand-in


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as `echo` puts it in front of an answer: its text, and its ids as they make up that text."""

    text: str
    token_ids: list[int]
    skip_special_tokens: bool


class CompletionLogprobs:
    """Parallel lists: tokens, token_logprobs, top_logprobs (text -> log-probability), text_offset."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._tokens: list[str] = []
        self._values: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add_prompt(self, echo: Echo, entries: Sequence[TokenLogprob]) -> None:
        """The echoed prompt; its first token has no log-probability."""
        text = IncrementalDetokenizer(self._tokenizer, skip_special_tokens=echo.skip_special_tokens)
        text.push(echo.token_ids)
        self._tokens.append(self._tokenizer.token_text(echo.token_ids[0]))
        self._values.append(None)
        self._tops.append(None)
        self._offsets.append(0)
        self.add(list(zip(entries, text.offsets[1:], strict=False)), 0)

    def add(self, entries: Sequence[tuple[TokenLogprob, int]], shift: int) -> None:
        """Tokens with their offsets in a text that begins `shift` characters into the answer's."""
        for entry, offset in entries:
            self._tokens.append(self._tokenizer.token_text(entry.token_id))
            self._values.append(finite(entry.logprob))
            top = {
                self._tokenizer.token_text(token_id): finite(value) for token_id, value in entry.top[: self._num_top]
            }
            top.setdefault(self._tokens[-1], finite(entry.logprob))
            self._tops.append(top)
            self._offsets.append(offset + shift)

    def fields(self) -> dict[str, list[Any]]:
        return {
            "tokens": self._tokens,
            "token_logprobs": self._values,
            "top_logprobs": self._tops,
            "text_offset": self._offsets,
        }


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob], num_top: int) -> list[dict[str, Any]]:
    """One object per token with its bytes and the best alternatives."""
    return [
        _token(tokenizer, entry.token_id, entry.logprob)
        | {"top_logprobs": [_token(tokenizer, token_id, value) for token_id, value in entry.top[:num_top]]}
        for entry in entries
    ]


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def finite(logprob: float) -> float:
    return max(logprob, LEAST) if not math.isnan(logprob) else LEAST
