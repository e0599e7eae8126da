"""Whose turn it is: sequences of one HTTP request are a group, and groups take turns, not sequences. Pure.

Without it one request of 2,048 prompts would be 2,048 places in front of everybody who comes after it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator

from moe_serve.engine.request import Request

GROUP_PLACES = 4
GROUP_TOKENS = 16
"""Beside others, a group of several sequences gets a quarter of a step's places and a sixteenth of its tokens."""
PROMPT_LOGPROB_PIECE = 16
"""Of prompts whose log-probabilities are asked for, a step takes a sixteenth of its tokens: each row costs as much as a
sampled one, and everybody else waits for the step to end."""
Line = OrderedDict[str, Request]


class WaitingLine:
    """Requests that wait, by group. Within a group the oldest goes first."""

    def __init__(self) -> None:
        self._groups: OrderedDict[str, Line] = OrderedDict()
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    @property
    def sizes(self) -> Counter[str]:
        """How many wait of each group."""
        return Counter({group: len(line) for group, line in self._groups.items()})

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    def add(self, request: Request) -> None:
        self._groups.setdefault(request.group, OrderedDict())[request.request_id] = request
        self._requests[request.request_id] = request

    def put_back(self, request: Request) -> None:
        """One that has run already: before all others of its group, its group before others that hold as much."""
        self.add(request)
        self._groups[request.group].move_to_end(request.request_id, last=False)
        self._groups.move_to_end(request.group, last=False)

    def remove(self, request: Request) -> None:
        line = self._groups[request.group]
        del line[request.request_id], self._requests[request.request_id]
        if not line:
            del self._groups[request.group]

    def first(self, running: Counter[str]) -> Request:
        """The next of the group that has least running; among equals, of the one that has waited longest."""
        best = None
        for group in self._groups:
            if best is None or running[group] < running[best]:
                best = group
            if not running[best]:
                break
        assert best is not None, "nobody waits"
        return next(iter(self._groups[best].values()))

    def in_turn(self, running: Counter[str]) -> list[Request]:
        """The first of each group, in the order of `first`."""
        return [next(iter(self._groups[group].values())) for group in sorted(self._groups, key=lambda g: running[g])]


class StepShares:
    """How much of one step each group may have: all of it when it is alone, else a part, which its sequences share.

    `sizes`: running and waiting sequences of each group.

    A group of one sequence is not held back: what it may take is an ordinary step's work.
    """

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int, sizes: Counter[str]) -> None:
        self._places = max(1, max_num_seqs // GROUP_PLACES)
        self._tokens = max(1, max_num_batched_tokens // GROUP_TOKENS)
        self._scored = max(1, max_num_batched_tokens // PROMPT_LOGPROB_PIECE)
        self._sizes = sizes
        self._used_places: Counter[str] = Counter()
        self._used_tokens: Counter[str] = Counter()

    def allow(self, request: Request, budget: int) -> int:
        """How many tokens a request may have of what is left of a step."""
        num_tokens = min(len(request.token_ids) - request.num_computed, budget)
        if len(self._sizes) > 1 and self._sizes[request.group] > 1:
            full = self._used_places[request.group] >= self._places
            num_tokens = 0 if full else min(num_tokens, self._tokens - self._used_tokens[request.group])
        return min(num_tokens, self._scored) if _scores_prompt(request) else num_tokens

    def take(self, request: Request, num_tokens: int) -> None:
        """A request gets so many."""
        self._used_places[request.group] += 1
        self._used_tokens[request.group] += num_tokens
        if _scores_prompt(request):
            self._scored -= num_tokens


def _scores_prompt(request: Request) -> bool:
    return request.prompt_logprobs is not None and request.num_computed + 1 < request.num_prompt
