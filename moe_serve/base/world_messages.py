"""Records with which a front-end asks the coordinator how its world stands; parts of FromMember and ToMember."""

from __future__ import annotations

from typing import Literal

import msgspec

MemberState = Literal["starting", "ready", "leaving", "silent"]


class WorldAsk(msgspec.Struct, frozen=True, tag="world_ask"):
    """Who is where, and since when?"""

    number: int


class MemberStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One process, as its coordinator last heard it.

    `dp` and `worker` as in Hello, `name` for people. `ranks` are those that it starts or serves ([]: none, or all).
    `phase` for people. `seconds_in_phase` go on while it is silent. `unfinished` requests as of an engine's last turn
    (None: not an engine). A front-end listens for HTTP at `address`.
    """

    role: str
    dp: int
    worker: int
    name: str
    host: str
    node: str
    pid: int
    state: MemberState
    step: int
    phase: str
    seconds_in_phase: float
    seconds_since_heard: float
    ranks: list[int] = []
    unfinished: int | None = None
    address: str = ""


class WorldStatus(msgspec.Struct, frozen=True, kw_only=True):
    """All of a world. `number` and `generation` as in WorldView; seconds since an event, not times of a clock.

    `missing` names who has not come or is not ready. `slow_step` (0: none) has taken longer than it should, and waits
    for the members at the places `waits_for` of `members`; after `step_timeout_seconds` it ends the world.
    """

    number: int
    generation: int
    engines: int
    ready: bool
    draining: bool
    ended: str
    missing: list[str]
    members: list[MemberStatus]
    step_timeout_seconds: float
    slow_step: int = 0
    waits_for: list[int] = []


class WorldAnswer(msgspec.Struct, frozen=True, tag="world_answer"):
    """To question `number`."""

    number: int
    world: WorldStatus
