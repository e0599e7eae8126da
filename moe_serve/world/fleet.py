"""The coordinator's whole state: who belongs to the world, who is alive, when it is ready, why it ends. No I/O.

`hear(member, message, now)`, `lost(member, now)` and `tick(now)` return what to send to whom. Once `ended` is set
the world is over: every member is told to stop, and the first reason stays.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moe_serve.base.config import differing_fields
from moe_serve.base.messages import (
    Ack,
    BalanceAnswer,
    BalanceAsk,
    Drain,
    Failure,
    FromMember,
    Frontends,
    Heartbeat,
    Hello,
    Leaving,
    Ready,
    Refused,
    StageReport,
    StepLoad,
    Stop,
    StoreAt,
    ToMember,
    Wake,
    Welcome,
    WorldReady,
)
from moe_serve.base.topology import Topology
from moe_serve.eplb.rearrangement import ForEngine
from moe_serve.eplb.rebalancer import Rebalancer
from moe_serve.eplb.surface import BalanceSurface

SILENCE_SECONDS = 7.0
OWN_GAP_SECONDS = 8.0
"""A coordinator that was stopped for so long itself has been given up by all members."""
QUIET_SECONDS = 1.8
"""Beats come every second: when a step is slow, whoever has been quiet for so long is the first to suspect."""
PEER_GRACE_SECONDS = 2.0
RESTING = ("asleep",)
WAITING = ("vote", "dispatch", "combine", "all-reduce", "gather", "reply")


@dataclass(slots=True)
class Member:
    """One process of the world, as last heard."""

    hello: Hello
    topology: Topology
    heard: float
    ready: bool = False
    note: str = ""
    leaving: bool = False
    step: int = 0
    phase: str = "starting"
    since: float = 0.0

    @property
    def name(self) -> str:
        hello = self.hello
        if hello.role == "api":
            who = "API server"
        elif hello.role == "engine":
            who = f"engine dp {hello.dp}"
        else:
            who = self.topology.describe_worker(hello.dp, hello.worker)
        return f"{who} (pid {hello.pid} on {hello.host})"

    @property
    def key(self) -> tuple[str, int, int]:
        return self.hello.role, self.hello.dp, self.hello.worker

    @property
    def last_seen(self) -> str:
        return "" if self.hello.role == "api" else f"; last seen in step {self.step}, phase {self.phase!r}"

    def is_quiet(self, now: float) -> bool:
        return now - self.heard > QUIET_SECONDS

    def in_phase(self, now: float, begin: float) -> float:
        """Seconds in its phase since `begin` as it last said itself; while it is quiet they go on."""
        return (now if self.is_quiet(now) else self.heard) - max(self.since, begin)


@dataclass(frozen=True, slots=True)
class Send:
    """Give `message` to `member`; afterwards close its line if `close`."""

    member: int
    message: ToMember
    close: bool = False


@dataclass(slots=True)
class Fleet:
    """`has_workers`: engines have worker processes of their own. `num_frontends` API servers are expected.

    `welcomed` are all that ever joined, by host and process id.
    """

    token: str
    topology: Topology
    agreement: Mapping[str, str]
    has_workers: bool
    step_timeout_seconds: float
    num_frontends: int = 1
    rebalancer: Rebalancer | None = None
    members: dict[int, Member] = field(default_factory=dict)
    welcomed: set[tuple[str, int]] = field(default_factory=set)
    ready: bool = False
    ended: Stop | None = None
    _store: StoreAt | None = None
    _ready_since: float = 0.0
    _suspicion: tuple[float, str] | None = None
    _now: float | None = None
    _own_gap: str = ""

    def hear(self, member: int, message: FromMember, now: float) -> list[Send]:
        """A record from a connection; the first one of each must be a Hello with the world's token."""
        self._pass_time(now)
        if isinstance(message, Hello):
            return self._hello(member, message, now)
        known = self.members.get(member)
        if known is None:
            return [Send(member, Refused("the first word must be a hello"), close=True)]
        known.heard = now
        match message:
            case Heartbeat():
                known.step, known.phase, known.since = message.step, message.phase, now - message.seconds
                return [Send(member, Ack())]
            case StoreAt():
                self._store = message
                return [Send(other, message) for other in self._role("engine") if other != member]
            case Ready():
                known.ready, known.note = True, message.note
                if self.rebalancer is not None and message.expert_bytes:
                    self.rebalancer.set_expert_bytes(message.expert_bytes)
                return self._ready(now)
            case Wake():
                return [Send(other, message) for other in self._role("engine") if other != member]
            case Leaving():
                known.leaving = True
                return self.end(Stop(message.reason or f"{known.name} left", 0)) if known.hello.role == "api" else []
            case Failure():
                return self._failure(known, message, now)
            case StageReport():
                return self._balance(lambda rebalancer: rebalancer.hear_stage(known.hello.dp, message, now))
            case StepLoad():
                return self._balance(lambda rebalancer: rebalancer.hear_load(message, now))
            case BalanceAsk():
                # Engines that are still loading would lose an order.
                surface = BalanceSurface(self.rebalancer, ready=self.ready)
                status, body, orders = surface.ask(message.action, message.body, now)
                answer = BalanceAnswer(number=message.number, status=status, body=body)
                return [Send(member, answer), *self._to_engines(orders)]

    def _balance(self, hear: Callable[[Rebalancer], list[ForEngine]]) -> list[Send]:
        return [] if self.rebalancer is None else self._to_engines(hear(self.rebalancer))

    def _to_engines(self, orders: list[ForEngine]) -> list[Send]:
        engines = {known.hello.dp: member for member, known in self.members.items() if known.hello.role == "engine"}
        return [Send(engines[each.dp], each.order) for each in orders if each.dp in engines]

    def lost(self, member: int, now: float) -> list[Send]:
        """A connection closed."""
        self._pass_time(now)
        known = self.members.pop(member, None)
        if known is None or known.leaving or self.ended is not None:
            return []
        return self.end(Stop(self._own_gap or f"{known.name} died{known.last_seen}", 1))

    def tick(self, now: float) -> list[Send]:
        """Look for silence and for steps that take too long; call it about twice a second."""
        self._pass_time(now)
        if self._suspicion is not None and now >= self._suspicion[0]:
            return self.end(Stop(self._suspicion[1], 1))
        for known in self.members.values():
            if not known.leaving and now - known.heard > SILENCE_SECONDS:
                return self.end(
                    Stop(
                        f"{known.name} has not been heard for {now - known.heard:.0f} s (is it stopped?)"
                        f"{known.last_seen}",
                        1,
                    )
                )
        return self._slow_step(now) or self._balance(lambda rebalancer: rebalancer.tick(now))

    def end(self, stop: Stop) -> list[Send]:
        """Tell everybody to stop; the first reason stays."""
        if self.ended is None:
            self.ended = stop
        return [Send(member, self.ended) for member in self.members]

    def drain(self, timeout: float) -> list[Send]:
        """Ask the front-ends to finish what they have; the world ends once they have left."""
        frontends = self._role("api")
        if not frontends or not self.ready:
            return self.end(Stop("asked to stop before the world was ready", 0))
        return [Send(member, Drain(timeout)) for member in frontends]

    def missing(self) -> list[str]:
        """Members that have not come or are not ready, by name."""
        arrived = {known.key: known for known in self.members.values()}
        names = []
        for role, dp, worker in self._expected():
            known = arrived.get((role, dp, worker))
            engine = arrived.get(("engine", dp, -1))
            if known is None and role == "worker" and engine is not None and engine.ready:
                continue  # somebody else's executor, which has no processes of ours
            if known is None:
                names.append(f"engine dp {dp}" if role == "engine" else self.topology.describe_worker(dp, worker))
            elif not known.ready and role != "worker":
                names.append(f"{known.name} (phase {known.phase!r})")
        servers = [known for known in self.members.values() if known.hello.role == "api"]
        names += [f"{known.name} (not listening yet)" for known in servers if not known.ready]
        return names + ["API server"] * (self.num_frontends - len(servers))

    def front_door(self) -> str:
        """Where the first API server says it listens, as host:port."""
        return next((known.note for known in self.members.values() if known.hello.role == "api"), "")

    def _pass_time(self, now: float) -> None:
        """Nobody else is to blame for seconds in which this process was stopped itself."""
        gap = 0.0 if self._now is None else now - self._now
        self._now = now
        if gap > OWN_GAP_SECONDS:
            self._own_gap = f"the coordinator itself was stopped for {gap:.0f} s, and the others gave it up"
        if gap > QUIET_SECONDS:
            for known in self.members.values():
                known.heard += gap

    def _expected(self) -> list[tuple[str, int, int]]:
        ranks = self.topology
        engines = [("engine", dp, -1) for dp in range(ranks.dp)]
        per_engine = ranks.num_workers if self.has_workers else 0
        return engines + [("worker", dp, worker) for dp in range(ranks.dp) for worker in range(per_engine)]

    def _role(self, role: str) -> list[int]:
        return [member for member, known in self.members.items() if known.hello.role == role]

    def _hello(self, member: int, hello: Hello, now: float) -> list[Send]:
        if not hmac.compare_digest(hello.token.encode(), self.token.encode()):
            return [Send(member, Refused("this token belongs to another world"), close=True)]
        newcomer = Member(hello, self.topology, heard=now, since=now)
        if self.ended is not None:
            return [Send(member, Refused(f"this world has ended: {self.ended.reason}"), close=True)]
        if hello.role != "api":
            if newcomer.key not in self._expected():
                return [Send(member, Refused(f"{newcomer.name} has no place in {self.topology}"), close=True)]
            if any(known.key == newcomer.key for known in self.members.values()):
                return [Send(member, Refused(f"{newcomer.name} is here already"), close=True)]
        differences = differing_fields(self.agreement, hello.agreement) if hello.agreement else []
        if differences:
            reason = f"{newcomer.name} was started with other options than rank 0: {'; '.join(differences)}"
            refused = [Send(member, Refused(reason), close=True)]
            return refused if self.ready else refused + self.end(Stop(reason, 2))
        self.members[member] = newcomer
        self.welcomed.add((hello.host, hello.pid))
        return [Send(member, Welcome()), *self._introductions(member, hello)]

    def _introductions(self, member: int, hello: Hello) -> list[Send]:
        addresses = [known.hello.address for known in self.members.values() if known.hello.role == "api"]
        if hello.role == "engine":
            sends: list[Send] = [Send(member, self._store)] if self._store is not None else []
            return [*sends, Send(member, Frontends(addresses))] if addresses else sends
        if hello.role == "api":
            return [Send(engine, Frontends(addresses)) for engine in self._role("engine")]
        return []

    def _ready(self, now: float) -> list[Send]:
        if self.ready or self.missing():
            return []
        self.ready, self._ready_since = True, now
        return [Send(member, WorldReady()) for member in self.members]

    def _failure(self, known: Member, failure: Failure, now: float) -> list[Send]:
        known.leaving = True
        reason = f"{known.name}: {failure.message}"
        if failure.suspects_peer:
            if self._suspicion is None:
                self._suspicion = (now + PEER_GRACE_SECONDS, reason)
            return []
        return self.end(Stop(failure.message if failure.config else reason, 2 if failure.config else 1))

    def _slow_step(self, now: float) -> list[Send]:
        if not self.ready:
            return []
        limit = self.step_timeout_seconds
        ranks = [known for known in self.members.values() if known.hello.role != "api" and not known.leaving]
        awake = [known for known in ranks if known.phase not in RESTING]
        slow = [known for known in awake if known.in_phase(now, self._ready_since) > limit]
        if not slow:
            return []
        last = max(known.step for known in slow)
        behind = [known for known in ranks if known.step < last and known.hello.role == "engine"]
        busy = [known for known in slow if not any(word in known.phase for word in WAITING)]
        quiet = [known for known in ranks if known.is_quiet(now)]
        culprits = quiet or behind or busy or slow
        named = "; ".join(
            f"{known.name} is in step {known.step}, phase {known.phase!r}, since "
            f"{known.in_phase(now, self._ready_since):.0f} s"
            for known in culprits
        )
        return self.end(
            Stop(
                f"step {last} has taken longer than step_timeout_seconds ({limit:g} s); it waits for: {named}",
                1,
            )
        )
