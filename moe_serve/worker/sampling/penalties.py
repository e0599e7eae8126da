"""What was said so far, per request, as the penalties need it: distinct tokens and how often each was generated."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from moe_serve.base.sampling import SamplingParams

Ints = npt.NDArray[np.int64]


def has_penalties(sampling: SamplingParams) -> bool:
    """Whether any of the three penalties does something."""
    return sampling.presence_penalty != 0 or sampling.frequency_penalty != 0 or sampling.repetition_penalty != 1


class TokenCounts:
    """Grows by one token per step in constant time; a prompt token that was never generated has count 0.

    Prompt tokens are only taken in where a repetition penalty asks for them.
    """

    __slots__ = ("_counts", "_place", "_tokens")

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        # All at once: a long prompt, many times, would hold up everybody's step.
        self._place: dict[int, int] = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._tokens: Ints = np.zeros(64 + len(self._place), dtype=np.int64)
        self._counts: Ints = np.zeros_like(self._tokens)
        self._tokens[: len(self._place)] = list(self._place)

    def generated(self, tokens: Iterable[int]) -> None:
        """Count tokens that were generated."""
        for token in tokens:
            place = self._place_of(token)
            self._counts[place] += 1

    @property
    def tokens(self) -> Ints:
        """Distinct tokens, in the order in which they came."""
        return self._tokens[: len(self._place)]

    @property
    def counts(self) -> Ints:
        """How often each of `tokens` was generated."""
        return self._counts[: len(self._place)]

    def _place_of(self, token: int) -> int:
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[place] = token
        return place
