"""What all DP ranks do next, decided by each of them alike from everybody's vote. Pure.

Once per step every rank tells all others its vote (one small exchange). If nobody has work all go to sleep in the
same step; naps are numbered, and only `Wake(n)` ends nap n, so that late or reordered wakes strand nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_serve.base.errors import EngineError


@dataclass(frozen=True, slots=True)
class Vote:
    """`num_tokens` this rank would compute in `step`; `has_work` unfinished requests; `nap` naps taken so far."""

    step: int
    nap: int
    has_work: bool
    num_tokens: int

    def to_ints(self) -> list[int]:
        return [self.step, self.nap, int(self.has_work), self.num_tokens]

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> Vote:
        step, nap, has_work, num_tokens = values
        return cls(step, nap, bool(has_work), num_tokens)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`run`: compute a step (a rank without tokens a dummy one), else sleep. `tokens_by_dp_rank` sizes of the step."""

    run: bool
    tokens_by_dp_rank: list[int]

    @property
    def padding(self) -> int:
        """Rows that are carried for nothing if every rank's share is padded to the largest."""
        return max(self.tokens_by_dp_rank) * len(self.tokens_by_dp_rank) - sum(self.tokens_by_dp_rank)


def decide(votes: Sequence[Vote]) -> Verdict:
    """All ranks' votes, in order of DP rank, to what all of them do. Raises EngineError naming ranks out of step."""
    for field in ("step", "nap"):
        values = [getattr(vote, field) for vote in votes]
        if len(set(values)) > 1:
            listing = ", ".join(f"dp {rank}: {value}" for rank, value in enumerate(values))
            raise EngineError(f"data-parallel ranks are out of step ({field} of {listing})")
    return Verdict(any(vote.has_work for vote in votes), [vote.num_tokens for vote in votes])


class Naps:
    """One rank's sleep. Wakes are remembered, since one may arrive before this rank has fallen asleep."""

    def __init__(self) -> None:
        self.taken = 0
        self._woken = 0

    @property
    def asleep(self) -> bool:
        return self._woken < self.taken

    def fall_asleep(self) -> int:
        """Begin the next nap; its number. It may be over already (see `asleep`)."""
        self.taken += 1
        return self.taken

    def hear(self, nap: int) -> None:
        """A Wake(nap) arrived."""
        self._woken = max(self._woken, nap)

    def wake_up(self) -> int:
        """End the current nap for a reason of one's own; its number is what the others must hear."""
        self._woken = max(self._woken, self.taken)
        return self.taken
