"""Votes, verdicts and naps: above all that late and reordered wakes strand nobody."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serve.base.errors import EngineError
from moe_serve.engine.lockstep import Naps, Verdict, Vote, decide


def test_one_rank_with_work_makes_all_run() -> None:
    votes = [Vote(3, 1, False, 0), Vote(3, 1, True, 7)]
    assert decide(votes) == Verdict(run=True, tokens_by_dp_rank=[0, 7])


def test_without_work_all_sleep() -> None:
    assert not decide([Vote(3, 1, False, 0)] * 3).run


def test_ranks_out_of_step_are_named() -> None:
    with pytest.raises(EngineError, match="dp 0: 3, dp 1: 4"):
        decide([Vote(3, 0, True, 1), Vote(4, 0, True, 1)])


def test_a_vote_of_another_generation_of_the_world_is_refused_by_name() -> None:
    with pytest.raises(EngineError, match="generation of dp 0: 1, dp 1: 2"):
        decide([Vote(3, 0, True, 1), Vote(3, 0, True, 1, generation=2)])


numbers = st.integers(0, 2**40)
any_vote = st.builds(
    Vote,
    step=numbers,
    nap=numbers,
    has_work=st.booleans(),
    num_tokens=numbers,
    staged_epoch=numbers,
    dropped_epoch=numbers,
    pieces_posted=numbers,
    recording=st.booleans(),
    generation=numbers,
    in_halves=st.booleans(),
)


@given(any_vote)
def test_a_vote_survives_the_wire(vote: Vote) -> None:
    assert Vote.from_ints(vote.to_ints()) == vote


def test_a_wake_that_arrives_before_its_nap_ends_it() -> None:
    naps = Naps()
    naps.hear(1)
    naps.fall_asleep()
    assert not naps.asleep


def test_a_late_wake_of_an_earlier_nap_wakes_nobody() -> None:
    naps = Naps()
    naps.fall_asleep()
    naps.hear(1)
    naps.fall_asleep()
    naps.hear(1)
    assert naps.asleep


# --- rearrangements (all engines together: tests/engine/test_rearranging.py) -----------------------------------------


def staging(staged: int = 0, dropped: int = 0, pieces: int = 0, *, recording: bool = False) -> Vote:
    return Vote(9, 2, False, 0, staged_epoch=staged, dropped_epoch=dropped, pieces_posted=pieces, recording=recording)


def test_experts_are_committed_in_the_step_in_which_all_say_that_they_are_staged() -> None:
    assert decide([staging(7), staging(), staging(7)]).commit_epoch == 0
    verdict = decide([staging(7)] * 3)
    assert verdict.commit_epoch == 7
    assert verdict.run, "nobody has work, but there is something to commit"
    assert not decide([staging(7), staging()]).run, "waiting for the rest needs no steps"


def test_different_epochs_are_never_committed() -> None:
    assert decide([staging(7), staging(8)]).commit_epoch == 0


def test_a_stage_is_dropped_once_all_have_heard_of_it_after_the_most_pieces_that_anybody_posted() -> None:
    assert decide([staging(dropped=7, pieces=4), staging(pieces=5)]).drop_after_pieces == -1
    verdict = decide([staging(dropped=7, pieces=4), staging(dropped=7, pieces=5), staging(dropped=7)])
    assert verdict.drop_after_pieces == 5
    assert verdict.run


def test_a_drop_wins_over_a_commit_in_the_same_step() -> None:
    verdict = decide([staging(7, dropped=7, pieces=3)] * 2)
    assert (verdict.commit_epoch, verdict.drop_after_pieces) == (0, 3)


def test_a_drop_that_some_have_not_heard_yet_does_not_stop_a_commit() -> None:
    verdict = decide([staging(7, dropped=7), staging(7)])
    assert (verdict.commit_epoch, verdict.drop_after_pieces) == (7, -1)


def test_single_steps_are_collected_while_all_record() -> None:
    assert decide([staging(recording=True)] * 2).recording
    assert not decide([staging(recording=True), staging()]).recording


epochs = st.sampled_from([0, 7, 8])


@given(st.lists(st.builds(staging, epochs, epochs, st.integers(0, 5)), min_size=1, max_size=5))
def test_a_verdict_commits_only_what_all_have_and_drops_only_what_all_gave_up(votes: list[Vote]) -> None:
    verdict = decide(votes)
    if verdict.commit_epoch:
        assert {vote.staged_epoch for vote in votes} == {verdict.commit_epoch}
        assert verdict.drop_after_pieces == -1
    if verdict.drop_after_pieces >= 0:
        assert len({vote.dropped_epoch for vote in votes}) == 1
        assert all(vote.dropped_epoch and vote.pieces_posted <= verdict.drop_after_pieces for vote in votes)
    assert verdict.run == bool(verdict.commit_epoch or verdict.drop_after_pieces >= 0)


# --- naps ------------------------------------------------------------------------------------------------------------


class World:
    """DP ranks in a simulation: votes are a barrier, wakes travel with any delay and in any order."""

    def __init__(self, size: int, chance: random.Random) -> None:
        self.chance = chance
        self.naps = [Naps() for _ in range(size)]
        self.work = [0] * size
        self.inbox: list[deque[int]] = [deque() for _ in range(size)]
        self.voting: set[int] = set()
        self.steps = 0

    def arrive(self, rank: int, steps: int) -> None:
        """A request for `steps` steps reaches a rank."""
        self.work[rank] += steps
        if self.naps[rank].asleep:
            nap = self.naps[rank].wake_up()
            for other, inbox in enumerate(self.inbox):
                if other != rank:
                    inbox.insert(self.chance.randint(0, len(inbox)), nap)

    def move(self, rank: int) -> None:
        """A rank does one thing: hears a wake, or goes to the vote if awake; the last one to come decides."""
        if self.inbox[rank] and self.chance.random() < 0.5:
            self.naps[rank].hear(self.inbox[rank].popleft())
        if self.naps[rank].asleep or rank in self.voting:
            return
        self.voting.add(rank)
        if len(self.voting) == len(self.naps):
            self.voting.clear()
            self.steps += 1
            votes = [Vote(self.steps, naps.taken, self.work[r] > 0, self.work[r]) for r, naps in enumerate(self.naps)]
            if decide(votes).run:
                self.work = [max(0, left - 1) for left in self.work]
            else:
                for naps in self.naps:
                    naps.fall_asleep()


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**32))
def test_late_and_reordered_wakes_strand_nobody(size: int, seed: int) -> None:
    chance = random.Random(seed)
    world = World(size, chance)
    for _ in range(40):
        for _ in range(chance.randint(0, 3)):
            world.arrive(chance.randrange(size), chance.randint(1, 3))
        for _ in range(chance.randint(0, 60)):
            world.move(chance.randrange(size))
    for _ in range(2000):
        for rank in range(size):
            world.move(rank)
        if not any(world.work) and all(naps.asleep for naps in world.naps):
            break
    assert not any(world.work), "work is left: a rank was stranded"
    assert all(naps.asleep for naps in world.naps), "the world does not come to rest"
    assert len({naps.taken for naps in world.naps}) == 1
