"""`doctor --peers`: finds out what there is to know of the way to one peer, where `doctor --listen` runs.

Small questions go over one line; large writes over lines of their own, since they may never arrive. No step waits for
ever, and what a step could not find out is left empty.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from typing import TypeVar

import msgspec

from moe_serve.doctor.line import OPEN_TOKEN, Line, LineError, NotTheSameToken, call
from moe_serve.doctor.listening import own_address, versions
from moe_serve.doctor.machine import look_up
from moe_serve.doctor.ports import TRY_SECONDS, OpenPorts, Tried, outcome_of, try_ports
from moe_serve.doctor.records import (
    BULK_SECONDS,
    MAX_BULK,
    Arrived,
    Bulk,
    Clock,
    ClockAsk,
    GiveBulk,
    Opened,
    OpenSome,
    TakeBulk,
    ToCaller,
    TriedYours,
    TryMine,
    Versions,
    WayFacts,
)

LINE_SECONDS = 30.0
BULK_LINE_SECONDS = 12.0
MAX_ADDRESSES = 8
CLOCK_ASKS = 20
LARGE_WRITE = 1 << 18
"""Many packets of full size at once, whatever the MTU is."""
BANDWIDTH_SECONDS = 0.5
ToCallerRecord = TypeVar("ToCallerRecord", Versions, Clock, Opened, TriedYours)
_to_caller: msgspec.msgpack.Decoder[ToCaller] = msgspec.msgpack.Decoder(ToCaller)
_arrived: msgspec.msgpack.Decoder[Arrived] = msgspec.msgpack.Decoder(Arrived)


def find_out(host: str, port: int, *, token: str, chosen: Sequence[int] = ()) -> WayFacts:
    """All that can be found out; it takes seconds where all is well, two minutes where nothing is."""
    facts = WayFacts(host=host, port=port, chosen=list(chosen))
    _names(facts)
    _reach(facts)
    if not facts.address:
        return facts
    with contextlib.suppress(LineError):
        facts.broke = "no doctor answers there"
        proved = _prove(facts, token)
        facts.broke = "it knows the token, and speaks another language: is a server of this world running there?"
        with contextlib.closing(_line(facts, proved, LINE_SECONDS)) as line:
            _talk(facts, line)
        facts.broke = ""
        facts.out = _bulk(facts, proved, outward=True)
        facts.back = _bulk(facts, proved, outward=False)
    return facts


def _names(facts: WayFacts) -> None:
    """Twice: some names have another answer each time."""
    for _ in range(2):
        answer = look_up(facts.host)
        facts.lookups.append(answer.addresses)
        facts.name_problem = facts.name_problem or answer.problem


def _reach(facts: WayFacts) -> None:
    for address in facts.lookups[0][:MAX_ADDRESSES]:
        try:
            with socket.create_connection((address, facts.port), timeout=TRY_SECONDS) as made:
                facts.reached[address] = Tried(facts.port, "open")
                if not facts.address:
                    facts.address, facts.own_address = address, own_address(made)
        except OSError as error:
            facts.reached[address] = Tried(facts.port, outcome_of(error), error.strerror or str(error))


def _prove(facts: WayFacts, token: str) -> str:
    """The token by which the other side knows us. LineError if there is none."""
    own = token or OPEN_TOKEN
    try:
        _line(facts, own, LINE_SECONDS).close()
        facts.token = "same" if token else "none"
        return own
    except NotTheSameToken:
        facts.token = "differs" if token else "only there"
        if not token:
            raise
    _line(facts, OPEN_TOKEN, LINE_SECONDS).close()
    facts.token = "only here"
    raise NotTheSameToken("nothing is told to somebody who does not know the token")


def _line(facts: WayFacts, token: str, seconds: float) -> Line:
    try:
        made = socket.create_connection((facts.address, facts.port), timeout=TRY_SECONDS)
    except OSError as error:
        raise LineError(error.strerror or str(error)) from error
    try:
        return call(made, token, time.monotonic() + seconds)
    except LineError:
        made.close()
        raise


def _talk(facts: WayFacts, line: Line) -> None:
    facts.mine = versions(line.socket, facts.address)
    facts.theirs = _ask(line, facts.mine, Versions)
    facts.broke = "the line broke while it was being used"
    _clock(facts, line)
    opened = _ask(line, OpenSome(facts.chosen), Opened)
    facts.there = [*opened.failed, *try_ports(facts.address, opened.ports, line.secret)]
    mine = OpenPorts(facts.own_address, sorted({facts.port, *facts.chosen}), line.secret)
    try:
        facts.here = [*mine.failed, *_ask(line, TryMine(mine.ports), TriedYours).tried]
    finally:
        mine.close()


def _clock(facts: WayFacts, line: Line) -> None:
    """By the quickest answer: half of its time is how wrong the difference can be."""
    for _ in range(CLOCK_ASKS):
        before, begun = time.time(), time.perf_counter()
        theirs = _ask(line, ClockAsk(), Clock).now
        took = time.perf_counter() - begun
        if facts.round_trip is None or took < facts.round_trip:
            facts.round_trip, facts.uncertainty = took, took / 2
            facts.offset = theirs - (before + took / 2)


def _ask(line: Line, question: object, kind: type[ToCallerRecord]) -> ToCallerRecord:
    line.send(question)
    answer = line.receive(_to_caller)
    if not isinstance(answer, kind):
        raise LineError(f"{type(answer).__name__} is no answer to {type(question).__name__}")
    return answer


def _bulk(facts: WayFacts, token: str, *, outward: bool) -> Bulk:
    """A large write; if it arrives, one that takes long enough to tell the bandwidth."""
    first = _move(facts, token, LARGE_WRITE, outward=outward)
    if first.arrived < first.count:
        return first
    rate = first.count / max(first.seconds, 1e-6)
    second = _move(facts, token, int(min(MAX_BULK, max(LARGE_WRITE, rate * BANDWIDTH_SECONDS))), outward=outward)
    return second if second.arrived == second.count else first


def _move(facts: WayFacts, token: str, count: int, *, outward: bool) -> Bulk:
    arrived, begun = 0, time.perf_counter()
    with contextlib.suppress(LineError), contextlib.closing(_line(facts, token, BULK_LINE_SECONDS)) as line:
        begun = time.perf_counter()
        if outward:
            line.send(TakeBulk(count))
            line.push_zeros(count)
            arrived = line.receive(_arrived).count
        else:
            line.send(GiveBulk(count))
            arrived = line.pull(count, BULK_SECONDS)
    return Bulk(count, arrived, time.perf_counter() - begun)
