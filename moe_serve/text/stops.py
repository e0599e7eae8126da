"""Stop strings in a text that grows: in the answer's own text, and across special tokens that the answer hides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_serve.text.decoding import Decoding, TextStream


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


@dataclass(frozen=True, slots=True)
class SpecialStop:
    """A stop string that hidden tokens are part of. Of the answer's text, `inside` of its last characters belong to
    it, not counting the `after` that come behind it. `ends_hidden`: its own last character is none of them.
    """

    stop: str
    inside: int
    after: int
    ends_hidden: bool


class SpecialStops:
    """Follows an answer as it would read with its special tokens shown, and looks for stop strings there.

    `held` so many of the last characters of the answer's own text may be the beginning of one.
    """

    def __init__(self, decoding: Decoding, shown: TextStream, stops: Sequence[str]) -> None:
        self.held = 0
        self._decoding = decoding
        self._stream = shown
        self._matcher = StopMatcher(stops)
        self._longest = max(map(len, stops))
        self._kinds = ""  # of the last characters, "s" for one of a special token, else "t"

    def push(self, token_id: int, *, counts: bool) -> SpecialStop | None:
        """The stop string that this token completes; it must not unless it `counts`."""
        text = self._stream.push(token_id)
        special = min(len(text), len(self._decoding.token_bytes(token_id).decode(errors="replace")))
        if not self._decoding.is_special(token_id):
            special = 0
        self._kinds = self._kinds[-self._longest :] + "t" * (len(text) - special) + "s" * special
        if not counts:
            return None
        found = self._matcher.feed(text)
        if found is None:
            self.held = self._kinds[len(self._kinds) - self._matcher.partial :].count("t")
            return None
        rest = len(self._kinds) - (len(text) - found[0])
        return SpecialStop(
            found[1],
            inside=self._kinds[max(rest - len(found[1]), 0) : rest].count("t"),
            after=self._kinds[rest:].count("t"),
            ends_hidden=self._kinds[rest - 1] == "s",
        )


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
