"""How a request wants its tokens chosen: one frozen record, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import msgspec

from moe_serve.base.errors import RequestError, shown

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_TOKEN_IDS = 1024  # looked at again in every step of the first min_tokens
MAX_LOGIT_BIAS = 1024  # the field's limit too; every entry costs in every step
OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")
INTEGERS = ("n", "top_k", "min_tokens", *OPTIONAL)
DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
"""What a checkpoint may have defaults of its own for."""
NUMBERS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Options of one generation. Names and defaults as in OpenAI's API and its usual extensions.

    temperature 0 means greedy. top_k 0 or -1 and top_p 1.0 mean no limit. `max_tokens` None means "to the end of
    the context". `seed` makes the text repeatable whatever else is in the batch; choice i of n uses seed + i.
    `logprobs` k returns the chosen token's log-probability (natural, of the unmodified logits) and the k best.
    `prompt_logprobs` the same for the prompt. `min_tokens` bans end tokens until so many tokens were made.
    `ignore_eos` goes on past an end token without banning it. Raises RequestError naming the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        _within("n", self.n, 1, MAX_CHOICES)
        _within("temperature", self.temperature, 0, 100)
        _within("top_p", self.top_p, 0, 1, open_low=True)
        _within("top_k", self.top_k, -1, None)
        _within("min_p", self.min_p, 0, 1)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _within("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 1, None)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _within(name, getattr(self, name), 0, MAX_LOGPROBS)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias may hold at most {MAX_LOGIT_BIAS} token ids, not {len(self.logit_bias)}",
                param="logit_bias",
            )
        for bias in self.logit_bias.values():
            _within("logit_bias", bias, -100, 100)
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"stop_token_ids may hold at most {MAX_STOP_TOKEN_IDS} ids, not {len(self.stop_token_ids)}",
                param="stop_token_ids",
            )
        if any(not text for text in self.stop):
            raise RequestError("stop must not hold an empty string", param="stop")

    def _check_types(self) -> None:
        """msgspec checks types only when it decodes, which is too late: in the engine, for everybody's requests."""
        for name in (*INTEGERS, *NUMBERS):
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL:
                self._set(name, _integer(name, value) if name in INTEGERS else _number(name, value))
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, not {shown(getattr(self, name))}", param=name)
        self._set("stop", _texts("stop", self.stop))
        ids = _items("stop_token_ids", self.stop_token_ids)
        self._set("stop_token_ids", tuple(_integer("stop_token_ids", token_id) for token_id in ids))
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping):
            raise RequestError(f"logit_bias must map token ids to biases, not {shown(bias)}", param="logit_bias")
        pairs = bias.items()
        self._set("logit_bias", {_integer("logit_bias", k): _number("logit_bias", v) for k, v in pairs})

    def _set(self, name: str, value: object) -> None:
        if value is not getattr(self, name):
            msgspec.structs.force_setattr(self, name, value)

    def choices(self) -> list[SamplingParams]:
        """The n single generations these params ask for; with a seed, choice i has seed + i (wrapping at 2^63)."""
        if self.n == 1:
            return [self]
        seeds = [None if self.seed is None else (self.seed + i + 2**63) % 2**64 - 2**63 for i in range(self.n)]
        return [msgspec.structs.replace(self, n=1, seed=seed) for seed in seeds]

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def with_defaults(defaults: Mapping[str, float], **given: Any) -> SamplingParams:
    """What was given, and for what was not the checkpoint's `defaults` (ModelConfig.generation_defaults)."""
    values: dict[str, Any] = {name: defaults[name] for name in DEFAULTED if name in defaults} | given
    values["top_k"] = int(values.get("top_k", 0))
    return SamplingParams(**values)


def _integer(name: str, value: object) -> int:
    """An integer of whatever library as Python's own, which alone can be sent to an engine."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise RequestError(f"{name} must be an integer, not {shown(value)}", param=name)
    return int(value)


def _number(name: str, value: object) -> float:
    if type(value) is float or type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RequestError(f"{name} must be a number, not {shown(value)}", param=name)
    return int(value) if isinstance(value, Integral) else float(value)


def _texts(name: str, value: object) -> tuple[str, ...]:
    """One string is a list of itself: ("end",) is meant, not ("e", "n", "d")."""
    if isinstance(value, str):
        return (value,)
    texts = _items(name, value)
    for text in texts:
        if not isinstance(text, str):
            raise RequestError(f"{name} must be a string or a list of strings, not of {shown(text)}", param=name)
    return tuple(text for text in texts if isinstance(text, str))


def _items(name: str, value: object) -> tuple[object, ...]:
    """The items of a list; None has none."""
    if isinstance(value, tuple):
        return value
    if value is not None and not isinstance(value, list | frozenset | set):
        raise RequestError(f"{name} must be a list, not {shown(value)}", param=name)
    return tuple(value or ())


def _within(name: str, value: float, low: float, high: float | None, *, open_low: bool = False) -> None:
    """RequestError unless low <= value <= high (low < value if open_low); NaN never passes."""
    inside = (value > low if open_low else value >= low) and (high is None or value <= high)
    if not inside:
        bound = f"{'greater than' if open_low else 'at least'} {low}" + (
            f" and at most {high}" if high is not None else ""
        )
        raise RequestError(f"{name} must be {bound}, not {value}", param=name)
