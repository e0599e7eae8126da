"""Token ids in, certain text out: one answer's text while it grows, with stop strings and per-token offsets.

The pieces put together equal what the answer's tokens add to the text of its prompt, cut at the first stop string.
The first stop string is the one that is complete first, so the text does not depend on how it was cut into tokens or
pushes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_serve.text.stops import SpecialStop, StopMatcher
from moe_serve.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """For one answer. `num_tokens` tokens were taken; `offsets[i]` where in the text token i begins (tokens that are
    held back together share their beginning); `stopped_by` the stop string that ended the answer, if one did: tokens
    after the one that completed it are not taken. Stop strings are not looked for in the first `min_tokens` tokens.

    `after` the prompt's tokens: the answer begins in the middle of their text. A stop string that holds the
    text of a special token is found though that be hidden.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        after: Sequence[int] = (),
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.num_tokens = 0
        self.offsets: list[int] = []
        self.stopped_by: str | None = None
        self._stream = tokenizer.stream(skip_special_tokens, after=after)
        self._matcher = StopMatcher(stop)
        self._specials = tokenizer.special_stops(stop, after) if skip_special_tokens and stop else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._length = 0
        self._held = ""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that became certain with these tokens."""
        pieces = []
        for token_id in token_ids:
            if self.stopped_by is not None:
                break
            self.offsets.append(self._length)
            self.num_tokens += 1
            special = None
            if self._specials is not None:
                special = self._specials.push(token_id, counts=self._stops_count)
            pieces.append(self._certain(self._stream.push(token_id), special))
        return "".join(pieces)

    def finish(self) -> str:
        """The rest of the text: incomplete characters as U+FFFD, and what could have begun a stop string."""
        if self.stopped_by is not None:
            return ""
        piece = self._certain(self._stream.finish())
        held, self._held = self._held, ""
        return piece + held if self.stopped_by is None else piece

    @property
    def _stops_count(self) -> bool:
        return self.num_tokens > self._min_tokens

    def _certain(self, text: str, special: SpecialStop | None = None) -> str:
        """What of held-back and new text can no longer be part of a stop string; `special` ends with this text."""
        if special is not None:
            text += self._stream.finish()  # the answer ends here: nothing more will come for what waits
        self._length += len(text)
        if not self._stops_count or not self._matcher.stops:
            return text
        found = self._matcher.feed(text)
        joined = self._held + text
        ends = [] if found is None else [(len(self._held) + found[0], False, len(found[1]), found[1])]
        if special is not None:
            ends.append((len(joined) - special.after, special.ends_hidden, special.inside, special.stop))
        if not ends:
            keep = len(joined) - max(self._matcher.partial, 0 if self._specials is None else self._specials.held)
            self._held = joined[max(keep, 0) :]
            return joined[: max(keep, 0)]
        end, _, visible, self.stopped_by = min(ends, key=lambda found: (*found[:2], -len(found[3])))
        self._held = ""
        return joined[: max(end - visible, 0)] + (self.stopped_by if self._include_stop else "")
