"""How a world stands, as its coordinator would tell it: phases, silence, whom a slow step waits for."""

from __future__ import annotations

from moe_serve.base.messages import Heartbeat
from moe_serve.base.progress import Phase
from moe_serve.base.world_messages import WorldAnswer, WorldAsk
from moe_serve.world.fleet import Fleet
from moe_serve.world.status import answer_ask, world_status
from tests.world.test_fleet import beat, engine, formed, make_fleet


def stuck(*, silent: bool) -> Fleet:
    """Rank 1 has been in its experts since second 1, or has not been heard since; rank 0 waits for it."""
    fleet = formed(make_fleet(step_timeout=60))
    for now in range(1, 7):
        beat(fleet, 0, float(now), step=9, phase=Phase.COMBINE, seconds=now - 1)
        if now == 1 or not silent:
            beat(fleet, 1, float(now), step=9, phase=Phase.EXPERTS, seconds=now - 1)
        beat(fleet, 9, float(now))
    return fleet


def test_a_rank_that_hangs_in_a_phase_is_whom_the_step_waits_for() -> None:
    status = world_status(stuck(silent=False), 6.2)
    assert (status.slow_step, [status.members[place].dp for place in status.waits_for]) == (9, [1])
    hanging = status.members[1]
    assert (hanging.state, hanging.phase, hanging.step) == ("ready", "layer 2 experts", 9)
    assert hanging.seconds_in_phase == 5


def test_a_rank_that_fell_silent_is_said_to_be_and_is_waited_for() -> None:
    status = world_status(stuck(silent=True), 6.5)
    silent = status.members[1]
    assert (silent.state, silent.seconds_since_heard, silent.seconds_in_phase) == ("silent", 5.5, 5.5)
    assert status.waits_for == [1]
    assert [each.state for each in status.members] == ["ready", "silent", "ready"]


def test_a_world_that_sleeps_waits_for_nobody() -> None:
    fleet = formed(make_fleet())
    for member in (0, 1, 9):
        beat(fleet, member, 500.0, phase=Phase.ASLEEP, seconds=499.0)
    status = world_status(fleet, 500.1)
    assert (status.slow_step, status.waits_for, status.ready) == (0, [], True)


def test_a_world_that_starts_names_who_is_missing() -> None:
    fleet = make_fleet()
    fleet.hear(0, engine(0), 0.0)
    status = world_status(fleet, 0.1)
    assert not status.ready
    assert any(name.startswith("engine dp 1") for name in status.missing)
    assert status.members[0].state == "starting"


def test_unfinished_requests_are_told_for_engines_only() -> None:
    fleet = formed(make_fleet())
    fleet.hear(1, Heartbeat(step=1, phase=Phase.VOTE, seconds=0, unfinished=7), 0.5)
    assert [each.unfinished for each in world_status(fleet, 1.0).members] == [0, 7, None]


def test_only_members_are_answered() -> None:
    fleet = formed(make_fleet())
    (sent,) = answer_ask(fleet, 9, WorldAsk(4), 1.0)
    assert isinstance(sent.message, WorldAnswer)
    assert (sent.member, sent.message.number) == (9, 4)
    assert answer_ask(fleet, 77, WorldAsk(5), 1.0) == []
