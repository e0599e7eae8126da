"""The coordinator of `bench.scale`, in a process of its own: all of it real, and its event loop watched.

It answers what its parent asks through a pipe: what it has spent since it was asked last, and how the world stands.
"""

from __future__ import annotations

import asyncio
import time
from asyncio import events
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

from moe_serve.base.config import Config
from moe_serve.base.eplb_config import EPLBConfig
from moe_serve.base.messages import FromMember, Stop
from moe_serve.base.topology import Topology
from moe_serve.eplb.placement import initial_placement
from moe_serve.eplb.questions import Planned, Solved, Unsolved
from moe_serve.eplb.rebalancer import Rebalancer
from moe_serve.world.coordinator import Coordinator
from moe_serve.world.fleet import Fleet
from moe_serve.world.parcels import Send

HOST = "127.0.0.1"
TOKEN = "token of a world to be measured"
STEP_TIMEOUT_SECONDS = 600.0
SMALLEST_SPARE = 32
"""Redundant slots where ranks are few: 58 x 256 -> 288, as DeepSeek-V3 is served."""
Ask = Literal["spent", "drain", "close"]


@dataclass(frozen=True, slots=True)
class Shape:
    """A world: one engine of one rank each, `node_size` of them started by one launcher."""

    ranks: int
    layers: int = 58
    experts: int = 256
    node_size: int = 8

    @property
    def redundant(self) -> int:
        """At least one slot for each rank, and as many for all."""
        slots = max(self.experts + SMALLEST_SPARE, self.ranks)
        return -(-slots // self.ranks) * self.ranks - self.experts


@dataclass(slots=True)
class Watch:
    """What a loop's thread has spent: the longest callback, and the longest turn (all that was ready at once)."""

    step_seconds: float = 0.0
    turn_seconds: float = 0.0
    cpu: float = field(default_factory=time.process_time)

    def taken(self) -> dict[str, float]:
        """Since this was asked last; in seconds of CPU, since others compute on this machine too."""
        now = time.process_time()
        found = {"cpu": now - self.cpu, "step": self.step_seconds, "turn": self.turn_seconds}
        self.step_seconds, self.turn_seconds, self.cpu = 0.0, 0.0, now
        return found


def watched_loop(watch: Watch) -> Callable[[], asyncio.AbstractEventLoop]:
    """A maker of asyncio's own loop, that looks at the clock around every turn and every callback."""
    run_handle: Callable[[events.Handle], None] = events.Handle._run

    def run(handle: events.Handle) -> None:
        before = time.thread_time()
        run_handle(handle)
        watch.step_seconds = max(watch.step_seconds, time.thread_time() - before)

    class Loop(asyncio.SelectorEventLoop):
        def _run_once(self) -> None:
            before = time.thread_time()
            super()._run_once()  # type: ignore[misc]
            watch.turn_seconds = max(watch.turn_seconds, time.thread_time() - before)

    events.Handle._run = run  # type: ignore[assignment,method-assign]
    return Loop


@dataclass(slots=True)
class WatchedFleet(Fleet):
    """Remembers how long solvers took (`solved` is what, seconds), and how many records it has heard."""

    solved: list[tuple[str, float]] = field(default_factory=list)
    num_heard: int = 0

    def hear(self, member: int, message: FromMember, now: float) -> list[Send]:
        self.num_heard += 1
        return Fleet.hear(self, member, message, now)

    def hear_solved(self, solved: Solved, now: float) -> list[Send]:
        if isinstance(solved.result, Unsolved):
            raise RuntimeError(solved.result.reason)
        self.solved.append(("plan" if isinstance(solved.result, Planned) else "shares", solved.seconds))
        return Fleet.hear_solved(self, solved, now)


def serve(pipe: Connection, shape: Shape) -> None:
    """Until the parent says close. First the port goes through the pipe."""
    watch = Watch()
    with asyncio.Runner(loop_factory=watched_loop(watch)) as runner:
        runner.run(_serve(pipe, shape, watch))


async def _serve(pipe: Connection, shape: Shape, watch: Watch) -> None:
    fleet = make_fleet(shape)
    coordinator = Coordinator(fleet, token=TOKEN)
    closed = asyncio.Event()

    def hear() -> None:
        asked: Ask = pipe.recv()
        if asked == "close":
            closed.set()
        elif asked == "drain":
            coordinator.drain(STEP_TIMEOUT_SECONDS)
        else:
            pipe.send(_standing(fleet) | watch.taken())

    pipe.send(await coordinator.start(HOST, 0))
    asyncio.get_running_loop().add_reader(pipe.fileno(), hear)
    await closed.wait()
    await coordinator.close()


def make_fleet(shape: Shape) -> WatchedFleet:
    """A world whose experts move as soon as anything would be gained."""
    topology = Topology(dp=shape.ranks)
    placement = initial_placement(
        "linear",
        num_layers=shape.layers,
        num_experts=shape.experts,
        num_ranks=shape.ranks,
        num_redundant=shape.redundant,
    )
    config = EPLBConfig(num_redundant_experts=shape.redundant, min_gain=0)
    return WatchedFleet(
        topology=topology,
        agreement=Config().agreement(),
        has_workers=False,
        step_timeout_seconds=STEP_TIMEOUT_SECONDS,
        node=node_of(0, shape),
        ranks_here=range(min(shape.node_size, shape.ranks)),
        rebalancer=Rebalancer(config, topology, placement, unix_time=time.time),
    )


def node_of(dp: int, shape: Shape) -> str:
    return f"node-{dp // shape.node_size}"


def _standing(fleet: WatchedFleet) -> dict[str, Any]:
    solved, fleet.solved = fleet.solved, []
    assert fleet.rebalancer is not None
    ended: Stop | None = fleet.ended
    return {
        "ready": fleet.ready,
        "members": len(fleet.members),
        "heard": fleet.num_heard,
        "ended": "" if ended is None else ended.reason,
        "moving": fleet.rebalancer.in_flight or fleet.rebalancer._inquiry.is_open,
        "epoch": fleet.rebalancer.epoch,
        "solved": solved,
    }
