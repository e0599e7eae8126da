"""Members of a world as their coordinator last heard them, and whom of them a slow step waits for. No I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from moe_serve.base.config import differing_fields
from moe_serve.base.messages import FrontendAt, Heartbeat, Hello, LineTo, Refused, Unfinished
from moe_serve.base.progress import Phase
from moe_serve.base.topology import Topology

SILENCE_SECONDS = 7.0
QUIET_SECONDS = 1.8
"""Beats come every second: when a step is slow, whoever has been quiet for so long is the first to suspect."""
SHOWN_WORKERS = 4
Key = tuple[str, int, int]
"""Role, DP rank, worker: what a rank of a world is known by."""

Place = Literal["none", "taken", "free"]


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
    phase: Phase = Phase.STARTING
    layer: int = 0
    num_unfinished: int = 0
    unfinished: Unfinished | None = None
    since: float = 0.0
    lines: set[int] = field(default_factory=set)
    """DP ranks whose line to this front-end stands."""

    @property
    def patience(self) -> float:
        """Seconds of silence after which it is given up. Beats come from its interpreter, which one thread may hold
        for long: a front-end runs others' code and tokenizers, a rank does not."""
        return max(SILENCE_SECONDS, self.hello.patience_seconds) if self.lines else SILENCE_SECONDS

    @property
    def name(self) -> str:
        hello = self.hello
        if hello.role == "api":
            who = "API server" if hello.places == 1 else f"API server {hello.place}"
        elif hello.role == "launcher":
            who = f"launcher of {f'node {hello.node_rank}' if self.is_node else named_ranks(hello.ranks)}"
        elif hello.role == "engine":
            who = f"engine dp {hello.dp}"
        else:
            who = self.topology.describe_worker(hello.dp, hello.worker)
        return f"{who} (pid {hello.pid} on {hello.host})"

    @property
    def key(self) -> Key:
        return self.hello.role, self.hello.dp, self.hello.worker

    @property
    def is_rank(self) -> bool:
        """Whether it takes part in steps."""
        return self.hello.role in ("engine", "worker")

    @property
    def is_node(self) -> bool:
        """Whether it is the launcher of one of an engine's other nodes, which has workers and nothing else."""
        return self.hello.role == "launcher" and self.hello.node_rank >= 0

    @property
    def place(self) -> str:
        """Its phase, for people."""
        return self.phase.describe(self.layer)

    @property
    def last_seen(self) -> str:
        return f"; last seen in step {self.step}, phase {self.place!r}" if self.is_rank else ""

    def beat(self, beat: Heartbeat, now: float) -> None:
        """Where it says that it is."""
        self.step, self.since = beat.step, now - beat.seconds
        self.phase, self.layer = beat.phase, beat.layer
        self.num_unfinished = beat.unfinished

    def is_quiet(self, now: float) -> bool:
        return now - self.heard > QUIET_SECONDS

    def in_phase(self, now: float, begin: float) -> float:
        """Seconds in its phase since `begin` as it last said itself; while it is quiet they go on."""
        return (now if self.is_quiet(now) else self.heard) - max(self.since, begin)


def named_ranks(ranks: Collection[int]) -> str:
    """`rank 1`, `ranks 1, 3`, `no rank`."""
    return "no rank" if not ranks else f"rank{'' if len(ranks) == 1 else 's'} {', '.join(map(str, ranks))}"


def expected_places(topology: Topology, *, has_workers: bool) -> list[Key]:
    """Member.key of all ranks of a world."""
    per_engine = topology.num_workers if has_workers else 0
    engines = [("engine", dp, -1) for dp in range(topology.dp)]
    return engines + [("worker", dp, worker) for dp in range(topology.dp) for worker in range(per_engine)]


def place_for(key: Key, topology: Topology, taken: Collection[Key], *, has_workers: bool) -> Place:
    """How the place stands of a rank of a world that is known by this key, as expected_places() lists them."""
    role, dp, worker = key
    workers = range(topology.num_workers if has_workers else 0) if role == "worker" else (-1,)
    if role not in ("engine", "worker") or not 0 <= dp < topology.dp or worker not in workers:
        return "none"
    return "taken" if key in taken else "free"


def missing_members(
    places: Iterable[Key], members: Collection[Member], topology: Topology, num_frontends: int
) -> list[str]:
    """Members that have not come or are not ready, by name. `num_frontends`: launchers that start API servers."""
    arrived = {known.key: known for known in members}
    names = []
    for role, dp, worker in places:
        known = arrived.get((role, dp, worker))
        engine = arrived.get(("engine", dp, -1))
        if known is None and role == "worker" and engine is not None and engine.ready:
            continue  # somebody else's executor, which has no processes of ours
        if known is None:
            names.append(f"engine dp {dp}" if role == "engine" else topology.describe_worker(dp, worker))
        elif not known.ready and role != "worker":
            names.append(f"{known.name} (phase {known.place!r}{_busy_workers(known, arrived)})")
    servers = [each for each in members if each.hello.role == "api" and each.hello.essential]
    names += [f"{known.name} (not listening yet)" for known in servers if not known.ready]
    of_node = {each.hello.node: each.hello.places for each in servers}
    absent = num_frontends - len(of_node) + sum(of_node.values()) - len(servers)
    return names + ["API server"] * absent


def _busy_workers(engine: Member, arrived: Mapping[Key, Member]) -> str:
    """For whom an engine waits while it starts: those of its workers that do not wait for others themselves."""
    if engine.phase is not Phase.REPLY:
        return ""
    own = (arrived.get(("worker", engine.hello.dp, worker)) for worker in range(engine.topology.num_workers))
    busy = [each for each in own if each is not None and not (each.phase.waits_for_others or each.phase.rests)]
    shown = [f"{each.name} in {each.place!r}" for each in busy[:SHOWN_WORKERS]]
    more = [f"{len(busy) - SHOWN_WORKERS} more"] if len(busy) > SHOWN_WORKERS else []
    return f": {', '.join(shown + more)}" if busy else ""


def front_doors(members: Iterable[Member]) -> dict[str, str]:
    """Where the first API server of each node that has one says it listens, as host:port."""
    doors: dict[str, str] = {}
    for known in members:
        if known.hello.role == "api" and known.hello.essential:
            doors.setdefault(known.hello.node, known.note)
    return doors


def frontends_at(members: Iterable[Member]) -> list[FrontendAt]:
    """Where front-ends listen that have not left."""
    hellos = [known.hello for known in members if known.hello.role == "api" and not known.leaving]
    return [FrontendAt(hello.address, hello.serves, hello.essential) for hello in hellos]


def why_not(
    newcomer: Member,
    place: Place,
    members: Iterable[Member],
    *,
    generation: int,
    ranks_here: Collection[int],
) -> Refused | None:
    """Why somebody who said hello cannot become a member. How its `place` stands counts for ranks.

    `ranks_here` are those that the coordinator's own launcher starts.
    """
    hello, topology = newcomer.hello, newcomer.topology
    if hello.generation not in (0, generation):
        return Refused(f"{newcomer.name} was started for another generation of this world")
    if hello.role == "launcher":
        return _why_no_launcher(newcomer, members, ranks_here)
    if newcomer.is_rank:
        if place == "none":
            return Refused(f"{newcomer.name} has no place in {topology}")
        if place == "taken":
            return Refused(f"{newcomer.name} is here already")
        if not hello.essential:
            return Refused(f"{newcomer.name} must be essential: every step needs every rank")
    outside = [dp for dp in hello.serves or () if not 0 <= dp < topology.dp]
    if outside or hello.serves == []:
        return Refused(f"{newcomer.name} must serve DP ranks in [0, {topology.dp}), not {hello.serves}")
    return None


def disagreement(newcomer: Member, agreement: Mapping[str, str]) -> str:
    """In what its options differ from those of rank 0, if in anything."""
    differences = differing_fields(agreement, newcomer.hello.agreement) if newcomer.hello.agreement else []
    shown = "; ".join(differences)
    first = "node 0" if newcomer.is_node else "rank 0"
    return f"{newcomer.name} was started with other options than {first}: {shown}" if differences else ""


def _why_no_launcher(newcomer: Member, members: Iterable[Member], ranks_here: Collection[int]) -> Refused | None:
    ranks, size, nodes = set(newcomer.hello.ranks), newcomer.topology.dp, newcomer.topology.nodes
    if newcomer.is_node:
        return _why_no_node(newcomer, members)
    if nodes > 1:
        return Refused(f"{newcomer.name} must be one of {nodes} nodes: rank 0 was started with --nnodes {nodes}")
    if bool(ranks) != newcomer.hello.essential or not ranks <= set(range(size)):
        return Refused(
            f"{newcomer.name} must start DP ranks in [0, {size}), not {newcomer.hello.ranks}; rank 0 was started with "
            f"--data-parallel-size {size}"
        )
    taken = ranks & set(ranks_here)
    if taken:
        return Refused(f"{newcomer.name}: {named_ranks(sorted(taken))} is started by the launcher of rank 0 itself")
    for known in members:
        taken = ranks & set(known.hello.ranks)
        if taken:
            # One that died without a word keeps its place until its silence is noticed.
            return Refused(f"{newcomer.name}: {known.name} is here already", patience_seconds=2 * SILENCE_SECONDS)
    return None


def _why_no_node(newcomer: Member, members: Iterable[Member]) -> Refused | None:
    node, nodes = newcomer.hello.node_rank, newcomer.topology.nodes
    if nodes == 1:
        return Refused(f"{newcomer.name} has no place here: rank 0 was started without --nnodes")
    if not 0 < node < nodes:
        return Refused(f"{newcomer.name} must be one in [1, {nodes}); node 0 was started with --nnodes {nodes}")
    for known in members:
        if known.is_node and known.hello.node_rank == node:
            return Refused(f"{newcomer.name}: {known.name} is here already", patience_seconds=2 * SILENCE_SECONDS)
    return None


def hear_line(members: Iterable[Member], dp: int, line: LineTo) -> None:
    """An engine's news of its line to a front-end."""
    for known in members:
        if known.hello.address == line.address and known.hello.role == "api":
            (known.lines.add if line.stands else known.lines.discard)(dp)


def left_behind(members: Iterable[Member]) -> str:
    """What a drain has not brought to an end: which requests of which rank, or who is still busy without any."""
    known = list(members)
    engines = sorted((each for each in known if each.hello.role == "engine"), key=lambda each: each.hello.dp)
    parts = [f"engine dp {each.hello.dp}: {_listing(each.unfinished)}" for each in engines if _has_work(each)]
    writing = [each.name for each in known if each.hello.role == "api" and not each.leaving]
    return "; ".join(parts or [f"{name} is still sending answers" for name in writing])


def _has_work(engine: Member) -> bool:
    return engine.unfinished is None or engine.unfinished.num_requests > 0


def _listing(left: Unfinished | None) -> str:
    if left is None:
        return "has not said what it has"
    more = left.num_requests - len(left.oldest)
    names = ", ".join(left.oldest) + (f" and {more} more" if more else "")
    return f"{left.num_requests} request{'s' if left.num_requests > 1 else ''} ({names})"


def slow_step(members: Iterable[Member], now: float, since: float, limit: float) -> str:
    """Who is to blame for a step of more than `limit` seconds since the world was ready (`since`), or ""."""
    step, slow = culprits(members, now, since, limit)
    if not slow:
        return ""
    named = "; ".join(
        f"{known.name} is in step {known.step}, phase {known.place!r}, since {known.in_phase(now, since):.0f} s"
        for known in slow
    )
    return f"step {step} has taken longer than step_timeout_seconds ({limit:g} s); it waits for: {named}"


def culprits(members: Iterable[Member], now: float, since: float, limit: float) -> tuple[int, list[Member]]:
    """A step that takes longer than `limit` (as in slow_step) and for whom it waits; nobody if none does."""
    ranks = [known for known in members if known.is_rank and not known.leaving]
    awake = [known for known in ranks if not known.phase.rests]
    if not any(known.in_phase(now, since) > limit for known in awake):
        return 0, []
    # Whoever beat last is not the first to be over the limit: beats may be so far apart.
    slow = [known for known in awake if known.in_phase(now, since) > limit - QUIET_SECONDS]
    last = max(known.step for known in slow)
    behind = [known for known in ranks if known.step < last and known.hello.role == "engine"]
    busy = [known for known in slow if not known.phase.waits_for_others]
    quiet = [known for known in ranks if known.is_quiet(now)]
    # All that stand in the same exchange look alike, however much later some of them came to it.
    return last, quiet or behind or busy or awake
