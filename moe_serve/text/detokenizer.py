"""Token ids in, certain text out: one answer's text while it grows, with stop strings and per-token offsets.

The pieces put together equal the tokenizer's decode of all tokens, cut at the first stop string. The first stop
string is the one that is complete first, so the text does not depend on how it was cut into tokens or pushes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_serve.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """For one answer. `num_tokens` tokens were taken; `offsets[i]` where in the text token i begins (tokens that are
    held back together share their beginning); `stopped_by` the stop string that ended the answer, if one did: tokens
    after the one that completed it are not taken. Stop strings are not looked for in the first `min_tokens` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.num_tokens = 0
        self.offsets: list[int] = []
        self.stopped_by: str | None = None
        self._stream = tokenizer.decoding.stream(skip_special_tokens)
        self._matcher = StopMatcher(stop)
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
            pieces.append(self._certain(self._stream.push(token_id)))
        return "".join(pieces)

    def finish(self) -> str:
        """The rest of the text: incomplete characters as U+FFFD, and what could have begun a stop string."""
        if self.stopped_by is not None:
            return ""
        piece = self._certain(self._stream.finish())
        held, self._held = self._held, ""
        return piece + held if self.stopped_by is None else piece

    def _certain(self, text: str) -> str:
        """What of held-back and new text can no longer be part of a stop string."""
        self._length += len(text)
        if self.num_tokens <= self._min_tokens or not self._matcher.stops:
            return text
        found = self._matcher.feed(text)
        joined = self._held + text
        if found is None:
            keep = len(joined) - self._matcher.partial
            self._held = joined[keep:]
            return joined[:keep]
        end, self.stopped_by = len(self._held) + found[0], found[1]
        self._held = ""
        return joined[: end if self._include_stop else end - len(self.stopped_by)]


class StopMatcher:
    """Looks for several strings in a text that arrives in pieces (Knuth-Morris-Pratt; each character seen once).

    `partial` the length of the longest end of the text so far that begins a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.partial = 0
        self._borders = [_borders(stop) for stop in self.stops]
        self._matched = [0] * len(self.stops)
        self._first = {stop[0] for stop in self.stops}

    def feed(self, text: str) -> tuple[int, str] | None:
        """Where in `text` the first stop string ends, and that string: the longest of those that end there."""
        if not self.partial and self._first.isdisjoint(text):
            return None
        for position, character in enumerate(text):
            found = [stop for place, stop in enumerate(self.stops) if self._advance(place, stop, character)]
            if found:
                return position + 1, max(found, key=len)
        self.partial = max(self._matched)
        return None

    def _advance(self, place: int, stop: str, character: str) -> bool:
        matched = self._matched[place]
        while matched and stop[matched] != character:
            matched = self._borders[place][matched - 1]
        matched += stop[matched] == character
        self._matched[place] = matched
        return matched == len(stop)


def _borders(text: str) -> list[int]:
    """For each prefix, the length of the longest proper prefix of it that is also its end."""
    borders = [0] * len(text)
    length = 0
    for place in range(1, len(text)):
        while length and text[place] != text[length]:
            length = borders[length - 1]
        length += text[place] == text[length]
        borders[place] = length
    return borders
