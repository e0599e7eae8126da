"""What all DP ranks do next, decided by each of them alike from everybody's vote. Pure.

Once per step every rank tells all others its vote (one small exchange). If nobody has work all go to sleep in the
same step; naps are numbered, and only `Wake(n)` ends nap n, so that late or reordered wakes strand nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from moe_serve.base.errors import EngineError


@dataclass(frozen=True, slots=True)
class Vote:
    """`num_tokens` this rank would compute in `step`, and `in_halves` if all do; `has_work` unfinished requests; `nap`
    naps taken so far.

    Of a rearrangement of experts: `staged_epoch` all weights are here, `dropped_epoch` told to give it up (0: neither),
    `pieces_posted` exchanges begun. `recording`: told to collect the load of every step.
    `generation` of the world that this rank belongs to.
    """

    step: int
    nap: int
    has_work: bool
    num_tokens: int
    staged_epoch: int = 0
    dropped_epoch: int = 0
    pieces_posted: int = 0
    recording: bool = False
    generation: int = 1
    in_halves: bool = False

    def to_ints(self) -> list[int]:
        return [int(getattr(self, each.name)) for each in fields(self)]

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> Vote:
        step, nap, has_work, num_tokens, staged, dropped, pieces, recording, generation, in_halves = values
        told = (num_tokens, staged, dropped, pieces, bool(recording), generation, bool(in_halves))
        return cls(step, nap, bool(has_work), *told)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`run`: compute a step (a rank without tokens a dummy one), else sleep. `tokens_by_dp_rank` sizes of the step,
    which all cut in two if `in_halves`.

    Before the step: commit `commit_epoch` (0: nothing), or give the stage under way up after `drop_after_pieces` pieces
    (-1: no). After it: collect the load (`recording`).
    """

    run: bool
    tokens_by_dp_rank: list[int]
    commit_epoch: int = 0
    drop_after_pieces: int = -1
    recording: bool = False
    in_halves: bool = False


def decide(votes: Sequence[Vote]) -> Verdict:
    """All ranks' votes, in order of DP rank, to what all of them do. Raises EngineError naming ranks out of step."""
    for field in ("generation", "step", "nap"):
        values = [getattr(vote, field) for vote in votes]
        if len(set(values)) > 1:
            listing = ", ".join(f"dp {rank}: {value}" for rank, value in enumerate(values))
            raise EngineError(f"data-parallel ranks are out of step ({field} of {listing})")
    commit_epoch = _agreed([vote.staged_epoch for vote in votes])
    dropped = _agreed([vote.dropped_epoch for vote in votes])
    return Verdict(
        run=any(vote.has_work for vote in votes) or bool(commit_epoch or dropped),
        tokens_by_dp_rank=[vote.num_tokens for vote in votes],
        commit_epoch=0 if dropped else commit_epoch,
        drop_after_pieces=max(vote.pieces_posted for vote in votes) if dropped else -1,
        recording=all(vote.recording for vote in votes),
        in_halves=all(vote.in_halves for vote in votes),
    )


def must_land(verdict: Verdict) -> bool:
    """Whether flights in the air (of which all ranks have as many) end before anything else is begun.

    So it is where nobody has tokens for another; and before experts are committed or given up, because votes know only
    of stages as the last flight that ended saw them.
    """
    rearranges = bool(verdict.commit_epoch) or verdict.drop_after_pieces >= 0
    return rearranges or not any(verdict.tokens_by_dp_rank)


def _agreed(epochs: Sequence[int]) -> int:
    """The epoch that every rank names; 0 where they differ."""
    return epochs[0] if len(set(epochs)) == 1 else 0


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
