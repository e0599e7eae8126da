"""What two doctors say to each other, and what the calling one knows of a way in the end."""

from __future__ import annotations

from typing import Annotated

import msgspec

from moe_serve.doctor.ports import MAX_PORTS, Tried

MAX_BULK = 1 << 26
"""Bytes that may be asked for, or announced, at once."""
BULK_SECONDS = 4.0
"""After which what has not arrived is not waited for."""
Ports = Annotated[list[Annotated[int, msgspec.Meta(ge=1, le=65535)]], msgspec.Meta(max_length=MAX_PORTS)]


class Versions(msgspec.Struct, frozen=True, tag="versions"):
    """Who speaks: what must be equal on all machines, its name, and the other's address as this one sees it."""

    package: str
    python: str
    torch: str
    host: str
    you: str
    mtu: int | None
    segment: int | None


class ClockAsk(msgspec.Struct, frozen=True, tag="clock_ask"):
    pass


class Clock(msgspec.Struct, frozen=True, tag="clock"):
    """Seconds since the epoch."""

    now: float


class OpenSome(msgspec.Struct, frozen=True, tag="open_some"):
    """Listen on random ports and on these, for the rest of this line."""

    chosen: Ports


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    ports: Ports
    failed: list[Tried]


class TryMine(msgspec.Struct, frozen=True, tag="try_mine"):
    """Connect to these ports of the machine that this line comes from."""

    ports: Ports


class TriedYours(msgspec.Struct, frozen=True, tag="tried_yours"):
    tried: list[Tried]


class TakeBulk(msgspec.Struct, frozen=True, tag="take_bulk"):
    """So many bytes follow on this line. Answered with Arrived."""

    count: int


class GiveBulk(msgspec.Struct, frozen=True, tag="give_bulk"):
    """Send so many bytes."""

    count: int


class Arrived(msgspec.Struct, frozen=True, tag="arrived"):
    """So many of them came."""

    count: int


ToListener = Versions | ClockAsk | OpenSome | TryMine | TakeBulk | GiveBulk
ToCaller = Versions | Clock | Opened | TriedYours | Arrived


class Bulk(msgspec.Struct, frozen=True):
    """`arrived` of `count` bytes in `seconds`."""

    count: int
    arrived: int
    seconds: float


class WayFacts(msgspec.Struct, kw_only=True):
    """All that was found out about the way to one peer. None, or empty, where it did not come so far.

    `lookups` are two answers for the same name. `reached` tells for each address whether `port` could be reached.
    `token` is "same", "differs", "only here", "only there" or "none". `offset` is their clock less ours, certain to
    `uncertainty` seconds. `there` are ports of theirs that were tried from here, `here` ports of ours from there.
    """

    host: str
    port: int
    chosen: list[int] = []
    lookups: list[list[str]] = []
    name_problem: str = ""
    reached: dict[str, Tried] = {}
    address: str = ""
    own_address: str = ""
    token: str = ""
    broke: str = ""
    mine: Versions | None = None
    theirs: Versions | None = None
    round_trip: float | None = None
    offset: float = 0.0
    uncertainty: float = 0.0
    there: list[Tried] = []
    here: list[Tried] = []
    out: Bulk | None = None
    back: Bulk | None = None
