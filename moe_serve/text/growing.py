"""One answer while it grows: an engine's events in, certain text with its tokens out, and how the answer ended.

It keeps no text or tokens: whoever wants a whole answer collects the growths, whoever streams forwards them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_serve.base.commands import TokenLogprob
from moe_serve.base.engine_messages import FinishReason, TokenEvent
from moe_serve.base.sampling import SamplingParams
from moe_serve.text.detokenizer import IncrementalDetokenizer
from moe_serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Growth:
    """What one event added. Tokens after the one that completed a stop string are not taken.

    `offsets[i]` where in the answer's text token i begins; `logprobs` one per token, None if not asked for.
    """

    text: str
    token_ids: list[int]
    offsets: list[int]
    logprobs: list[TokenLogprob] | None


class GrowingText:
    """For one answer to the tokens `prompt`. `finish_reason` is None while it grows; `stop_reason` the stop string or
    token that ended it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], sampling: SamplingParams) -> None:
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._wants_logprobs = sampling.logprobs is not None
        self._text = IncrementalDetokenizer(
            tokenizer,
            after=prompt,
            skip_special_tokens=sampling.skip_special_tokens,
            stop=sampling.stop,
            include_stop=sampling.include_stop_str_in_output,
            min_tokens=sampling.min_tokens,
        )

    def take(self, event: TokenEvent) -> Growth:
        """Book an event. The last one, or the first that completes a stop string, sets how the answer ended."""
        before = self._text.num_tokens
        text = self._text.push(event.token_ids)
        taken = self._text.num_tokens - before
        if event.finish_reason is not None:
            text += self._text.finish()
        # After finish(): what was held back until then may complete a stop string.
        stopped_by = self._text.stopped_by
        self.finish_reason = event.finish_reason if stopped_by is None else "stop"
        self.stop_reason = event.stop_token if stopped_by is None else stopped_by
        logprobs = (event.logprobs or [])[:taken] if self._wants_logprobs else None
        return Growth(text, event.token_ids[:taken], self._text.offsets[before:], logprobs)
