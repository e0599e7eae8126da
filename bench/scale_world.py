"""One world of `bench.scale`: a real coordinator, all its members, and the events of their life, each one measured."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from bench.scale_coordinator import HOST, TOKEN, Shape, node_of, serve
from bench.scale_members import Crowd, Line, epoch_of
from bench.traces import GENERATORS, sample
from moe_serve.base.balance_messages import StageReport, StepLoad
from moe_serve.base.config import Config
from moe_serve.base.messages import Ack, Failure, Heartbeat, Hello, Leaving, LineTo, Ready, StoreAt, Unfinished, Wake
from moe_serve.base.progress import Phase
from moe_serve.world.link import frame

EXPERT_BYTES = 44_040_192
"""Of DeepSeek-V3: three matrices of 7,168 x 2,048 in FP8. Larger than most chunks: one layer each."""
TOKENS_PER_RANK = 64
FRONTEND = "tcp://10.0.0.1:9000"
LOOK_SECONDS = 0.02
QUIET_LOOKS = 3
MOST_SECONDS = 100.0
BEAT = Heartbeat(step=1000, phase=Phase.DISPATCH, seconds=0.01, layer=17)
STEADY_TURNS_PER_SECOND = 200


@dataclass(frozen=True, slots=True)
class Measured:
    """What an event took: messages and bytes to the coordinator (`in`) and from it, its CPU, its longest delays.

    `step_ms` the longest callback of its loop, `turn_ms` the longest turn: all that was ready at once. Both of CPU.
    """

    ranks: int
    event: str
    messages_in: int
    messages_out: int
    bytes_in: int
    bytes_out: int
    cpu_ms: float
    wall_ms: float
    step_ms: float
    turn_ms: float
    plan_ms: float = 0.0
    shares_ms: float = 0.0


class World:
    """`meet()` first. Every method is an event, and is measured into `events`."""

    def __init__(self, shape: Shape, pipe: Connection, port: int, tell: Callable[[str], None]) -> None:
        self.shape = shape
        self.events: list[dict[str, Any]] = []
        self.crowd = Crowd(HOST, port, TOKEN)
        self._pipe = pipe
        self._tell = tell
        self._step = 0

    @property
    def _engines(self) -> list[Line]:
        return [line for line in self.crowd.lines if line.hello.role == "engine"]

    @property
    def _api(self) -> Line:
        return next(line for line in self.crowd.lines if line.hello.role == "api")

    async def meet(self, *, ready: bool = True) -> None:
        """All members connect at once; who has been let in loads nothing and is ready at once."""

        async def work() -> None:
            await self.crowd.join(_hellos(self.shape))
            self._engines[0].send(StoreAt("10.0.0.1", 29500))
            for line in self._engines if ready else ():
                line.send(Ready(expert_bytes=EXPERT_BYTES))
            if ready:
                self._api.send(Ready(note="10.0.0.1:8000"))

        standing = await self.measured("meet", work, beating=True, until=lambda now: now["ready"] == ready)
        assert standing["ready"] == ready
        assert standing["members"] == len(self.crowd.lines)

    async def lines(self) -> None:
        """Every engine tells that its line to the front-end stands."""

        async def work() -> None:
            for line in self._engines:
                line.send(LineTo(address=FRONTEND, stands=True))

        await self.measured("lines to the front-end", work)

    async def beats(self) -> None:
        """All members beat in the same moment."""

        async def work() -> None:
            for line in self.crowd.lines:
                line.send(BEAT)

        await self.measured("beats at once", work)
        assert self.events[-1]["messages_out"] == len(self.crowd.lines)

    async def steady(self, seconds: int) -> None:
        """All members beat once a second, each in its own moment; numbers are of one second."""

        async def work() -> None:
            beating = asyncio.create_task(self._beat())
            await asyncio.sleep(seconds)
            beating.cancel()

        await self.measured("a second of beats", work, per=seconds)

    async def load(self) -> None:
        """Engine 0 reports the load of some steps; nothing follows of it yet."""

        async def work() -> None:
            self._report(1)

        await self.measured("load report", work)

    async def wake(self) -> None:
        """A request comes to one rank of a sleeping world. Falling asleep needs no coordinator."""

        async def work() -> None:
            self._engines[-1].send(Wake(1))

        await self.measured("wake by one", work)
        assert self.crowd.tally.heard["wake"] == self.shape.ranks - 1

    async def wake_by_all(self) -> None:
        """All ranks of a sleeping world wake it in the same moment, as when each has staged its experts."""

        async def work() -> None:
            for line in self._engines:
                line.send(Wake(2))

        await self.measured("wake by all", work)

    async def rearrange(self) -> None:
        """The interval is over: a plan, and chunk by chunk its shares, stages, votes and commits."""
        staged: Counter[int] = Counter()
        engines = self._engines

        def hear(line: Line, tag: str, head: bytes) -> None:
            if tag != "stage_experts":
                return
            epoch = epoch_of(head)
            line.send(StageReport(epoch=epoch, state="staged"))
            staged[epoch] += 1
            if staged[epoch] == len(engines):  # then every vote names it, and all commit in one step
                for each in engines:
                    each.send(StageReport(epoch=epoch, state="committed", bytes_received=EXPERT_BYTES))

        async def work() -> None:
            self._report(1000)

        self.crowd.hear = hear
        standing = await self.measured("rearrange", work, beating=True)
        assert standing["epoch"] == max(staged), standing
        self.events[-1]["chunks"] = len(staged)

    async def even_out(self) -> None:
        """New shares for the copies of all experts, without a weight moved: every 50 steps."""

        async def work() -> None:
            self._report(50)

        await self.measured("new shares", work, beating=True)
        assert self.crowd.tally.heard["set_shares"] == self.shape.ranks

    async def lose_one(self) -> None:
        """An engine's process is gone; until all others have been told."""

        async def work() -> None:
            self._engines[self.shape.ranks // 2].close()

        standing = await self.measured("lose one rank", work)
        assert f"engine dp {self.shape.ranks // 2} " in standing["ended"], standing
        assert self.crowd.tally.heard["stop"] == len(self.crowd.lines) - 1

    async def fail_alike(self) -> None:
        """Every engine finds the same mistake in its options while it loads, and says so."""

        async def work() -> None:
            for line in self._engines:
                line.send(Failure("the KV cache has no room (--kv-cache-memory-bytes)", config=True))

        await self.measured("all fail alike", work)

    async def drain(self) -> None:
        """Asked to stop: engines say what they have, the front-end leaves, all are told to end."""

        def hear(line: Line, tag: str, _head: bytes) -> None:
            if tag == "drain":
                line.send(Leaving() if line.hello.role == "api" else Unfinished(0))

        async def work() -> None:
            self._pipe.send("drain")

        self.crowd.hear = hear
        standing = await self.measured("drain", work, until=lambda standing: bool(standing["ended"]))
        assert self.crowd.tally.heard["stop"] == len(self.crowd.lines), standing

    async def measured(
        self,
        event: str,
        work: Callable[[], Awaitable[None]],
        *,
        per: int = 1,
        beating: bool = False,
        until: Callable[[dict[str, Any]], bool] = lambda standing: not standing["moving"],
    ) -> dict[str, Any]:
        """Do it, and wait until the coordinator has heard everything and nothing more comes of it.

        `beating`: it may take longer than silence may last, so all members beat meanwhile. Their beats are not counted
        as messages, but what they cost is in the seconds.
        """
        self._tell(f"{self.shape.ranks:,} ranks: {event}")
        tally = self.crowd.tally
        await self._all_heard()
        self._look()  # what was spent before is not counted
        tally.begin()
        begun = time.monotonic()
        beats = asyncio.create_task(self._beat()) if beating else None
        await work()
        standing, wall = await self._settled(begun, until, beats)
        out, not_counted = sum(tally.heard.values()), tally.heard["ack"] if beating else 0
        found = Measured(
            ranks=self.shape.ranks,
            event=event,
            messages_in=(tally.sent - not_counted) // per,
            messages_out=(out - not_counted) // per,
            bytes_in=(tally.bytes_sent - not_counted * len(frame(BEAT))) // per,
            bytes_out=(tally.bytes_heard - not_counted * len(frame(Ack()))) // per,
            cpu_ms=standing["cpu"] * 1000 / per,
            wall_ms=wall * 1000,
            step_ms=standing["step"] * 1000,
            turn_ms=standing["turn"] * 1000,
            plan_ms=_solved_ms(standing, "plan"),
            shares_ms=_solved_ms(standing, "shares"),
        )
        self.events.append(asdict(found))
        return standing

    async def _beat(self) -> None:
        """All members, each in its own moment of every second; for ever."""
        begun, turn = time.monotonic(), 0
        while True:
            for line in self.crowd.lines[turn % STEADY_TURNS_PER_SECOND :: STEADY_TURNS_PER_SECOND]:
                line.send(BEAT)
            turn += 1
            await asyncio.sleep(begun + turn / STEADY_TURNS_PER_SECOND - time.monotonic())

    async def _all_heard(self) -> None:
        """Nobody has been silent for long when an event begins."""
        if self.crowd.lines and not any(line.lost for line in self.crowd.lines):
            for line in self.crowd.lines:
                line.send(BEAT)
            await self._settled(time.monotonic(), lambda _standing: True)

    async def _settled(
        self,
        begun: float,
        until: Callable[[dict[str, Any]], bool],
        beats: asyncio.Task[None] | None = None,
    ) -> tuple[dict[str, Any], float]:
        """How the world stands, with what was spent since `begun`; and seconds until the last byte came.

        The `beats` end once it stands as it should.
        """
        tally = self.crowd.tally
        whole: dict[str, Any] = {"cpu": 0.0, "step": 0.0, "turn": 0.0, "solved": []}
        seen, last, quiet = -1, begun, 0
        while time.monotonic() - begun < MOST_SECONDS:
            await asyncio.sleep(LOOK_SECONDS)
            if tally.bytes_heard != seen:
                seen, last, quiet = tally.bytes_heard, time.monotonic(), 0
            _add(whole, self._look())
            if beats is not None:
                if until(whole):
                    beats.cancel()
                    beats = None
                continue
            quiet = quiet + 1 if whole["heard"] == tally.total_sent and until(whole) else 0
            if quiet > QUIET_LOOKS:
                return whole, last - begun
        raise TimeoutError(f"the world does not settle: {whole}, heard {dict(tally.heard)} of {tally.total_sent} sent")

    def _look(self) -> dict[str, Any]:
        self._pipe.send("spent")
        found: dict[str, Any] = self._pipe.recv()
        return found

    def _report(self, steps: int) -> None:
        """Load as skewed as a model's, drawn anew for every report."""
        self._step += steps
        shape, generator = self.shape, np.random.default_rng(self._step)
        tokens = TOKENS_PER_RANK * shape.ranks * min(steps, 50)
        counts = np.zeros((shape.layers, 2, shape.experts), dtype=np.int64)
        popularity = GENERATORS["lognormal"](np.random.default_rng(0), 1, shape.layers, shape.experts)[0]
        counts[:, 1] = sample(generator, popularity, tokens=tokens)
        self._engines[0].send(StepLoad(step=self._step, steps=steps, load=counts.tobytes()))


@contextlib.contextmanager
def world_of(shape: Shape, tell: Callable[[str], None]) -> Iterator[World]:
    """A coordinator in a process of its own; the lines of its members belong to the running loop."""
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, shape), daemon=True)
    process.start()
    theirs.close()
    world = World(shape, pipe, pipe.recv(), tell)
    try:
        yield world
    finally:
        world.crowd.close()
        with contextlib.suppress(OSError):
            pipe.send("close")
        process.join(30)
        if process.is_alive():
            process.kill()


def _hellos(shape: Shape) -> list[Hello]:
    """Launchers of all nodes but the first, engines, and the API server of the first."""
    agreement = Config().agreement()
    nodes = range(shape.node_size, shape.ranks, shape.node_size)
    launchers = [
        Hello(
            role="launcher",
            pid=first,
            host=node_of(first, shape),
            agreement=agreement,
            node=node_of(first, shape),
            ranks=list(range(first, min(first + shape.node_size, shape.ranks))),
        )
        for first in nodes
    ]
    engines = [
        Hello(role="engine", dp=dp, pid=10_000 + dp, host=node, agreement=agreement, node=node)
        for dp in range(shape.ranks)
        for node in (node_of(dp, shape),)
    ]
    node = node_of(0, shape)
    return [*launchers, *engines, Hello(role="api", pid=9, host=node, address=FRONTEND, agreement=agreement, node=node)]


def _add(whole: dict[str, Any], found: dict[str, Any]) -> None:
    """What was spent adds up, and of the longest the longest stays; everything else is as found last."""
    whole |= found | {
        "cpu": whole["cpu"] + found["cpu"],
        "step": max(whole["step"], found["step"]),
        "turn": max(whole["turn"], found["turn"]),
        "solved": whole["solved"] + found["solved"],
    }


def _solved_ms(standing: dict[str, Any], what: str) -> float:
    solved: list[tuple[str, float]] = standing["solved"]
    return sum(seconds for kind, seconds in solved if kind == what) * 1000
