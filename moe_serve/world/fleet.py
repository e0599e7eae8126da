"""The coordinator's whole state: who belongs to the world, who is alive, when it is ready, why it ends. No I/O.

`hear(member, message, now)`, `lost(member, now)` and `tick(now)` return what to send to whom. Once `ended` is set
the world is over: every member is told to stop, and the first reason stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from moe_serve.base.balance_messages import BalanceAsk, StageReport, StepLoad
from moe_serve.base.messages import (
    Ack,
    Drain,
    EngineAt,
    Failure,
    ForFleet,
    Heartbeat,
    Hello,
    Leaving,
    LineTo,
    Ready,
    Refused,
    Retire,
    Stop,
    StoreAt,
    Unfinished,
    Wake,
    Welcome,
    WorldReady,
    WorldView,
)
from moe_serve.base.topology import Topology
from moe_serve.eplb.questions import Question, Solved
from moe_serve.eplb.rearrangement import ForEngine
from moe_serve.eplb.rebalancer import Rebalancer
from moe_serve.eplb.surface import BalanceSurface
from moe_serve.world.draining import Draining
from moe_serve.world.members import (
    Key,
    Member,
    disagreement,
    expected_places,
    front_doors,
    frontends_at,
    hear_line,
    missing_members,
    place_for,
    slow_step,
    why_not,
)
from moe_serve.world.orders import dated, refuse, tell_nodes, tell_ready, to_engines
from moe_serve.world.own_time import OwnTime
from moe_serve.world.parcels import Send, answer_parcel
from moe_serve.world.places import Places

LAST_SECONDS = 30.0
"""After which somebody else listens where a world has ended, or nobody."""
PEER_GRACE_SECONDS = 2.0


@dataclass(slots=True)
class Fleet:
    """`has_workers`: engines have worker processes of their own. `num_frontends` launchers start API servers.

    `generation`, `number` and `placement` as in WorldView. `node` of the coordinator, whose launcher starts
    `ranks_here`.
    `welcomed` are all that ever joined, by host and process id.
    """

    topology: Topology
    agreement: Mapping[str, str]
    has_workers: bool
    step_timeout_seconds: float
    num_frontends: int = 1
    generation: int = 1
    number: int = 1
    node: str = ""
    ranks_here: Collection[int] = ()
    placement: str = ""
    rebalancer: Rebalancer | None = None
    members: dict[int, Member] = field(default_factory=dict)
    welcomed: set[tuple[str, int]] = field(default_factory=set)
    ready: bool = False
    ready_since: float = 0.0
    ended: Stop | None = None
    draining: Draining | None = None
    _places: Places = field(default_factory=Places)
    _suspicion: tuple[float, Stop] | None = None
    _time: OwnTime = field(default_factory=OwnTime)
    _log: list[str] = field(default_factory=list)
    _taken: set[Key] = field(default_factory=set)
    _num_ready: int = 0
    _last_wake: int = 0
    _surface: BalanceSurface = field(default_factory=lambda: BalanceSurface(None))

    def hear(self, member: int, message: ForFleet, now: float) -> list[Send]:
        """A record from a connection; from somebody who knows the world's token; the first must be a Hello."""
        self._time.pass_to(now, self.members.values())
        if isinstance(message, Hello):
            return self._hello(member, message, now)
        known = self.members.get(member)
        if known is None:
            return [Send(member, Refused("the first word must be a hello"), close=True)]
        known.heard = now
        match message:
            case Heartbeat():
                known.beat(message, now)
                return [Send(member, Ack())]
            case StoreAt() | EngineAt():
                return self._places.take(message, self.members, member)
            case Ready():
                self._num_ready += not known.ready
                known.ready, known.note = True, message.note
                if self.rebalancer is not None and message.expert_bytes:
                    self.rebalancer.set_expert_bytes(message.expert_bytes)
                return self._ready(now)
            case Wake():
                return self._woken(member, message)
            case Unfinished():
                known.unfinished = message
                return []
            case LineTo():
                hear_line(self.members.values(), known.hello.dp, message)
                return []
            case Retire():
                return self.drain(message.timeout, now, node=known.hello.node)
            case Leaving():
                known.leaving = True
                if known.is_node and self._places.engine is not None:  # until then another may come in its place
                    return self.end(Stop(f"{known.name} left: {message.reason}", 1, known.hello.node))
                return self._left(known, message.reason) if known.hello.role == "api" else []
            case Failure():
                return self._failure(member, known, message, now)
            case StageReport() if message.generation != self.generation:
                return []
            case StageReport():
                return self._balance(lambda rebalancer: rebalancer.hear_stage(known.hello.dp, message, now))
            case StepLoad():
                return self._balance(lambda rebalancer: rebalancer.hear_load(message, now))
            case BalanceAsk():
                return self._asked(member, message)

    def hear_solved(self, solved: Solved, now: float) -> list[Send]:
        """The answer to one of `take_questions()`."""
        if self.ended is not None or self.rebalancer is None:
            self._log.append("dropped what was worked out for load balancing: the world has ended")
            return []
        if not self._surface.is_waiting(solved.number):
            return to_engines(self.members, self.rebalancer.hear_solved(solved, now))
        question, (status, body, orders) = self._surface.conclude(solved, now)
        return [Send(question.member, answer_parcel(question.request, status, body)), *to_engines(self.members, orders)]

    def take_questions(self) -> list[Question]:
        """What is to be worked out for load balancing, each given once."""
        decisions = [] if self.rebalancer is None else self.rebalancer.take_questions()
        return [*(dated(each, self.generation) for each in decisions), *self._surface.take_questions()]

    def _asked(self, member: int, ask: BalanceAsk) -> list[Send]:
        """Engines that are still loading would lose an order."""
        if self._surface.rebalancer is not self.rebalancer:
            self._surface = BalanceSurface(self.rebalancer)
        given = self._surface.ask(member, ask, ready=self.ready)
        return [] if given is None else [Send(member, answer_parcel(ask.number, given[0], given[1]))]

    def _balance(self, hear: Callable[[Rebalancer], list[ForEngine]]) -> list[Send]:
        return [] if self.rebalancer is None else to_engines(self.members, hear(self.rebalancer))

    def lost(self, member: int, now: float) -> list[Send]:
        """A connection closed."""
        self._time.pass_to(now, self.members.values())
        known = self.members.pop(member, None)
        if known is None or self.ended is not None:
            return []
        self._taken.discard(known.key)
        if not known.hello.essential:
            return self._do_without(known, "left" if known.leaving else f"died{known.last_seen}")
        if known.leaving:
            return []
        return self.end(Stop(self._time.excuse or f"{known.name} died{known.last_seen}", 1, known.hello.node))

    def tick(self, now: float) -> list[Send]:
        """Look for silence and for steps that take too long; call it about twice a second."""
        self._time.pass_to(now, self.members.values())
        if self._suspicion is not None and now >= self._suspicion[0]:
            return self.end(self._suspicion[1])
        for member, known in list(self.members.items()):
            if not known.leaving and now - known.heard > known.patience:
                how = f"has not been heard for {now - known.heard:.0f} s (is it stopped?){known.last_seen}"
                return self._give_up(member, known, how)
        if self.draining is not None and self.ended is None:
            stop, line = self.draining.judge(self.members.values(), now)
            self._log += [line] if line else []
            if stop is not None:
                return self.end(stop)
        slow = slow_step(self.members.values(), now, self.ready_since, self.step_timeout_seconds) if self.ready else ""
        return self.end(Stop(slow, 1)) if slow else self._balance(lambda rebalancer: rebalancer.tick(now))

    def choked(self, member: int, waiting_bytes: int) -> list[Send]:
        """A member does not take in what it is sent: so much waits for it, more than may."""
        known = self.members.get(member)
        if known is None or self.ended is not None:
            return []
        how = f"does not read what it is sent: {waiting_bytes / 2**20:.0f} MiB wait{known.last_seen}"
        return self._give_up(member, known, how)

    def end(self, stop: Stop) -> list[Send]:
        """Tell everybody to stop, once; the first reason stays."""
        if self.ended is not None:
            return []  # thousands may fail alike, and each would be told by each
        self.ended = stop
        return [Send(member, stop) for member in self.members]

    def drain(self, timeout: float, now: float, *, node: str = "") -> list[Send]:
        """Ask the front-ends of a node to finish what they have (all, where it has none).

        The world ends once all front-ends have left, once those have and nobody has work, or after `timeout`.
        """
        frontends = self._role("api")
        if not frontends or not self.ready:
            return self.end(Stop("asked to stop before the world was ready", 0, node))
        of_node = [member for member in frontends if self.members[member].hello.node == node]
        self.draining = Draining(node=node, timeout=timeout, until=now + timeout)
        return [Send(member, Drain(timeout)) for member in (*(of_node or frontends), *self._role("engine"))]

    def missing(self) -> list[str]:
        """Members that have not come or are not ready, by name."""
        places = expected_places(self.topology, has_workers=self.has_workers)
        return missing_members(places, list(self.members.values()), self.topology, self.num_frontends)

    def front_door(self, node: str | None = None) -> str:
        """Where the API server of a node (of any, None) says it listens, as host:port; "" where there is none."""
        doors = front_doors(self.members.values())
        return next(iter(doors.values()), "") if node is None else doors.get(node, "")

    @property
    def view(self) -> WorldView:
        """What members are told of the world."""
        return WorldView(
            generation=self.generation,
            number=self.number,
            engines=self.topology.dp,
            frontends=frontends_at(self.members.values()),
            placement=self.placement,
        )

    def take_log(self) -> list[str]:
        """What an operator should read; each line is given once."""
        log, self._log = self._log, []
        return log

    def _role(self, role: str) -> list[int]:
        return [member for member, known in self.members.items() if known.hello.role == role]

    def _hello(self, member: int, hello: Hello, now: float) -> list[Send]:
        newcomer = Member(hello, self.topology, heard=now, since=now)
        if self.ended is not None:
            return [Send(member, Refused(f"this world has ended: {self.ended.reason}", LAST_SECONDS), close=True)]
        others = list(self.members.values())
        place = place_for(newcomer.key, self.topology, self._taken, has_workers=self.has_workers)
        refused = why_not(newcomer, place, others, generation=self.generation, ranks_here=self.ranks_here)
        if refused is not None:
            return refuse(member, hello, refused, self._log)
        if reason := disagreement(newcomer, self.agreement):
            told = refuse(member, hello, Refused(reason), self._log)
            alone = self.ready or not hello.essential or hello.role == "launcher"  # which can be started again
            return told if alone else told + self.end(Stop(reason, 2))
        self.members[member] = newcomer
        self._taken.add(newcomer.key)
        self.number = max(self.number, hello.worlds + 1)
        self.welcomed.add((hello.host, hello.pid))
        told = self._tell_view(but=member) if hello.role == "api" else self._places.tell(member, newcomer)
        return [Send(member, Welcome(self.view)), *told]

    def _tell_view(self, *, but: int = -1) -> list[Send]:
        view = self.view
        return [Send(member, view) for member in (*self._role("engine"), *self._role("api")) if member != but]

    def _left(self, known: Member, reason: str) -> list[Send]:
        """A front-end left on purpose. Drained, the world ends with the last of them."""
        others = [each for each in self.members.values() if each.hello.role == "api" and not each.leaving]
        if not others if self.draining is not None else known.hello.essential:
            node = known.hello.node if self.draining is None else self.draining.node  # who was asked, not who was told
            return self.end(Stop(reason or f"{known.name} left", 0, node))
        return self._tell_view() if known.hello.essential else []

    def _give_up(self, member: int, known: Member, how: str) -> list[Send]:
        """A member that is connected but of no use."""
        stop = Stop(f"{known.name} {how}", 1, known.hello.node)
        if known.hello.essential:
            return self.end(stop)
        del self.members[member]
        return [Send(member, stop, close=True), *self._do_without(known, how)]

    def _do_without(self, known: Member, how: str) -> list[Send]:
        """A member that is not essential is gone, and the others go on."""
        self._log.append(f"{known.name} {how}; the others go on")
        return self._left(known, "") or self._tell_view()

    def _ready(self, now: float) -> list[Send]:
        if self.ready:  # a front-end that came later
            return [Send(member, WorldReady()) for member in self._role("api")]
        if self._num_ready < self.topology.dp + self.num_frontends or self.missing():
            return []
        self.ready, self.ready_since = True, now
        tell_nodes(self.rebalancer, self.members.values(), self.topology)
        return tell_ready(self.members)

    def _woken(self, member: int, wake: Wake) -> list[Send]:
        """The first who wakes wakes all; after a stage all ranks wake each other in the same moment."""
        if wake.generation != self.generation or wake.nap <= self._last_wake:
            return []
        self._last_wake = wake.nap
        return [Send(other, wake) for other in self._role("engine") if other != member]

    def _failure(self, member: int, known: Member, failure: Failure, now: float) -> list[Send]:
        known.leaving = True
        reason = f"{known.name}: {failure.message}"
        if not known.hello.essential:
            self._log.append(f"{reason}; the others go on")
            return [Send(member, Stop(reason, 2 if failure.config else 1))]
        if failure.suspects_peer:
            if self._suspicion is None:
                self._suspicion = (now + PEER_GRACE_SECONDS, Stop(reason, 1, known.hello.node))
            return []
        code = 2 if failure.config else 1
        return self.end(Stop(failure.message if failure.config else reason, code, known.hello.node))
