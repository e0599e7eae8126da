"""How a world stands, told to whoever asks: where its members are, since when, whom a slow step waits for. No I/O."""

from __future__ import annotations

from moe_serve.base.world_messages import MemberState, MemberStatus, WorldAnswer, WorldAsk, WorldStatus
from moe_serve.world.fleet import Fleet
from moe_serve.world.members import Member, culprits
from moe_serve.world.parcels import Send

SLOW_SECONDS = 3.0
"""In one phase of a step: longer than a beat and its silence, so that who is behind is told from who waits."""


def answer_ask(fleet: Fleet, member: int, ask: WorldAsk, now: float) -> list[Send]:
    """For a member; nothing for somebody who has not said hello."""
    return [Send(member, WorldAnswer(ask.number, world_status(fleet, now)))] if member in fleet.members else []


def world_status(fleet: Fleet, now: float) -> WorldStatus:
    """By what the coordinator has heard so far."""
    members = sorted(fleet.members.values(), key=_place)
    limit = min(SLOW_SECONDS, fleet.step_timeout_seconds)
    slow_step, slow = culprits(members, now, fleet.ready_since, limit) if fleet.ready else (0, [])
    waited_for = {id(known) for known in slow}
    return WorldStatus(
        number=fleet.number,
        generation=fleet.generation,
        engines=fleet.topology.dp,
        ready=fleet.ready,
        draining=fleet.draining is not None,
        ended="" if fleet.ended is None else fleet.ended.reason,
        missing=fleet.missing(),
        members=[_status(known, now) for known in members],
        step_timeout_seconds=fleet.step_timeout_seconds,
        slow_step=slow_step,
        waits_for=[place for place, known in enumerate(members) if id(known) in waited_for],
    )


def _place(member: Member) -> tuple[bool, int, int, str]:
    """Ranks in order, then the others."""
    hello = member.hello
    return not member.is_rank, hello.dp, hello.worker, hello.role


def _status(member: Member, now: float) -> MemberStatus:
    hello = member.hello
    return MemberStatus(
        role=hello.role,
        dp=hello.dp,
        worker=hello.worker,
        name=member.name,
        host=hello.host,
        node=hello.node,
        pid=hello.pid,
        state=_state(member, now),
        step=member.step,
        phase=member.place if member.is_rank else "",
        seconds_in_phase=max(0.0, member.in_phase(now, member.since)) if member.is_rank else 0.0,
        seconds_since_heard=max(0.0, now - member.heard),
        ranks=list(hello.ranks or hello.serves or ()),
        unfinished=member.num_unfinished if hello.role == "engine" else None,
        address=member.note if hello.role == "api" else "",
    )


def _state(member: Member, now: float) -> MemberState:
    if member.leaving:
        return "leaving"
    if member.is_quiet(now):
        return "silent"
    # Workers and launchers never say that they are ready: their engine, or their world, does.
    return "ready" if member.ready or member.hello.role in ("worker", "launcher") else "starting"
