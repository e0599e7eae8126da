"""Records between members of a world and their coordinator (`FromMember`, `ToMember`). msgspec, no torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from moe_serve.base.balance_messages import BalanceAnswer, BalanceAsk, DropStage, Record, StageReport, StepLoad
from moe_serve.base.commands import SetShares, StageExperts
from moe_serve.base.progress import Phase
from moe_serve.base.world_messages import WorldAnswer, WorldAsk

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no record: nesting and texts have errors of their own."""

Role = Literal["api", "engine", "worker", "launcher"]


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """First word of every member. `agreement` is Config.agreement(); empty for workers, whose engine vouches.

    `address` is where a front-end listens for engines ("" otherwise). `worker` is the index within the engine
    (Topology.worker_index); it and `dp` are -1 where they mean nothing.

    The world ends with an `essential` member; only front-ends can be others, which come and go. A front-end `serves`
    these DP ranks only (None: all), and may be silent for `patience_seconds` as long as an engine's line to it stands:
    its interpreter is busy with something else, since a stopped process answers on no line.

    `node` and `machine` as in Site. `generation` of the world that it was started for (0: it takes whichever it meets).
    A launcher beside the coordinator's says which DP `ranks` it starts, or as which of an engine's nodes it starts
    workers (`node_rank`; -1 for others), and in how many worlds it has been. An API server is number `place` of the
    `places` that its launcher starts.
    """

    role: Role
    dp: int = -1
    worker: int = -1
    pid: int
    host: str
    address: str = ""
    agreement: dict[str, str] = {}
    essential: bool = True
    serves: list[int] | None = None
    patience_seconds: float = 60.0
    node: str = ""
    machine: str = ""
    generation: int = 0
    ranks: list[int] = []
    node_rank: int = -1
    worlds: int = 0
    place: int = 0
    places: int = 1


class FrontendAt(msgspec.Struct, frozen=True):
    """Where a front-end listens for engines; `serves` and `essential` as in Hello."""

    address: str
    serves: list[int] | None = None
    essential: bool = True


class WorldView(msgspec.Struct, frozen=True, kw_only=True, tag="world_view"):
    """The world as its coordinator sees it; told with the welcome, and to engines and front-ends whenever it changes.

    Whoever runs reads the number of `engines` (DP ranks) here, not in its options. What carries another `generation`
    was meant for a world of other members, and is not for this one. `placement` is the digest of the first placement
    of experts that the coordinator counts on ("" where it counts on none). A generation is drawn at random, so that no
    two worlds of one deployment share it; `number` counts them, for people.
    """

    generation: int = 1
    number: int = 1
    engines: int
    frontends: list[FrontendAt] = []
    placement: str = ""


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """You belong here, and this is how it looks."""

    view: WorldView


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """You do not belong here; the sentence says why. It may be worth to ask again for `patience_seconds`."""

    reason: str
    patience_seconds: float = 0.0


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """Alive. `step` last entered, `phase` (in `layer`) where in it, `seconds` since then; `unfinished` requests."""

    step: int
    phase: Phase
    seconds: float
    layer: int = 0
    unfinished: int = 0


class Ack(msgspec.Struct, frozen=True, tag="ack"):
    """The coordinator heard your heartbeat and is alive itself."""


class EngineAt(msgspec.Struct, frozen=True, tag="engine_at"):
    """Where an engine listens for workers that other nodes start: told by the engine, passed on to their launchers."""

    address: str


class StoreAt(msgspec.Struct, frozen=True, tag="store_at"):
    """Where rank 0's store listens: told by engine 0, passed on to all engines."""

    host: str
    port: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """This member can serve (an engine: loaded and its KV cache made; a front-end: listening, at host:port `note`).

    `expert_bytes` from an engine, as its workers found it (WorkerFacts).
    """

    note: str = ""
    expert_bytes: int = 0


class WorldReady(msgspec.Struct, frozen=True, tag="world_ready"):
    """Every member is ready. To a launcher: `front_door` is where the API server of its node listens, as host:port."""

    front_door: str = ""


class Wake(msgspec.Struct, frozen=True, tag="wake"):
    """End nap number `nap` of a generation; ignored by whoever is not in (or about to take) exactly that nap."""

    nap: int
    generation: int = 1


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """To front-ends: take no new requests, finish those in flight, say Leaving. To engines: say what is Unfinished.

    After `timeout` seconds the coordinator ends the world, whatever is left.
    """

    timeout: float


class Retire(msgspec.Struct, frozen=True, tag="retire"):
    """From a launcher that was asked to stop: drain its node; end the world within `timeout` seconds."""

    timeout: float


class Unfinished(msgspec.Struct, frozen=True, tag="unfinished"):
    """From an engine while the world drains: how many requests it still has, and the names of the oldest."""

    num_requests: int
    oldest: list[str] = []


class LineTo(msgspec.Struct, frozen=True, kw_only=True, tag="line_to"):
    """From an engine: whether its line to the front-end at `address` stands. Who answers there is libzmq's own thread,
    which waits for no interpreter."""

    address: str
    stands: bool


class Leaving(msgspec.Struct, frozen=True, tag="leaving"):
    """This member goes on purpose; its closed link is no death."""

    reason: str = ""


class Failure(msgspec.Struct, frozen=True, tag="failure"):
    """This member cannot go on. `config` marks the operator's mistake (exit code 2).

    `suspects_peer`: an exchange with other ranks failed, so probably one of them died; whoever did is blamed first.
    """

    message: str
    config: bool = False
    suspects_peer: bool = False


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End now. `code` 0 for an orderly end, else `reason` names who failed. `node` of whoever ends the world."""

    reason: str
    code: int
    node: str = ""


ForFleet = (
    Hello
    | Heartbeat
    | StoreAt
    | EngineAt
    | Ready
    | Wake
    | Retire
    | Unfinished
    | LineTo
    | Leaving
    | Failure
    | StageReport
    | StepLoad
    | BalanceAsk
)
"""What makes a coordinator's fleet another one, or may."""
FromMember = ForFleet | WorldAsk
ToMember = (
    Welcome
    | Refused
    | Ack
    | StoreAt
    | EngineAt
    | WorldView
    | WorldReady
    | Wake
    | Drain
    | Stop
    | StageExperts
    | SetShares
    | DropStage
    | Record
    | BalanceAnswer
    | WorldAnswer
)
