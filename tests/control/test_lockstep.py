"""Votes, verdicts and naps: above all that late and reordered wakes strand nobody."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serve.base.errors import EngineError
from moe_serve.control.lockstep import Naps, Verdict, Vote, decide


def test_one_rank_with_work_makes_all_run() -> None:
    votes = [Vote(3, 1, False, 0), Vote(3, 1, True, 7)]
    assert decide(votes) == Verdict(run=True, tokens_by_dp_rank=[0, 7])


def test_without_work_all_sleep() -> None:
    assert not decide([Vote(3, 1, False, 0)] * 3).run


def test_ranks_out_of_step_are_named() -> None:
    with pytest.raises(EngineError, match="dp 0: 3, dp 1: 4"):
        decide([Vote(3, 0, True, 1), Vote(4, 0, True, 1)])


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.booleans(), st.integers(0, 2**20))
def test_a_vote_survives_the_wire(step: int, nap: int, has_work: bool, num_tokens: int) -> None:
    vote = Vote(step, nap, has_work, num_tokens)
    assert Vote.from_ints(vote.to_ints()) == vote


@given(st.lists(st.integers(0, 100), min_size=1, max_size=8))
def test_padding_is_what_the_largest_share_costs_the_others(tokens: list[int]) -> None:
    assert Verdict(True, tokens).padding == sum(max(tokens) - own for own in tokens)


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
