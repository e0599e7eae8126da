"""How a request wants its tokens chosen: one frozen record, checked when it is made."""

from __future__ import annotations

import msgspec

from moe_serve.base.errors import RequestError

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_TOKEN_IDS = 1024  # looked at again in every step of the first min_tokens
MAX_LOGIT_BIAS = 1024  # the field's limit too; every entry costs in every step
OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
INTEGERS = ("n", "top_k", "min_tokens", *OPTIONAL)
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
        if isinstance(self.stop, str):  # ("end",) is meant, not ("e", "n", "d")
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        for name in (*INTEGERS, *NUMBERS):
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int if name in INTEGERS else (int, float)):
                what = "an integer" if name in INTEGERS else "a number"
                raise RequestError(f"{name} must be {what}, not {value!r}", param=name)

    def choices(self) -> list[SamplingParams]:
        """The n single generations these params ask for; with a seed, choice i has seed + i (wrapping at 2^63)."""
        if self.n == 1:
            return [self]
        seeds = [None if self.seed is None else (self.seed + i + 2**63) % 2**64 - 2**63 for i in range(self.n)]
        return [msgspec.structs.replace(self, n=1, seed=seed) for seed in seeds]

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _within(name: str, value: float, low: float, high: float | None, *, open_low: bool = False) -> None:
    """RequestError unless low <= value <= high (low < value if open_low); NaN never passes."""
    inside = (value > low if open_low else value >= low) and (high is None or value <= high)
    if not inside:
        bound = f"{'greater than' if open_low else 'at least'} {low}" + (
            f" and at most {high}" if high is not None else ""
        )
        raise RequestError(f"{name} must be {bound}, not {value}", param=name)
