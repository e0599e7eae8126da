"""Records between processes: members of a world <-> coordinator, and front-ends <-> engines. msgspec, no torch.

The link to the coordinator carries `FromMember` and `ToMember`; the sockets between a front-end and an engine
carry `ToEngine` and `FromEngine`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from moe_serve.base.balance_messages import BalanceAnswer, BalanceAsk, DropStage, Record, StageReport, StepLoad
from moe_serve.base.commands import SetShares, StageExperts, TokenLogprob
from moe_serve.base.progress import Phase
from moe_serve.base.sampling import SamplingParams

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no record: nesting and texts have errors of their own."""

Role = Literal["api", "engine", "worker", "launcher"]
FinishReason = Literal["stop", "length", "abort", "error"]


# --- members <-> coordinator -----------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """First word of every member. `agreement` is Config.agreement(); empty for workers, whose engine vouches.

    `address` is where a front-end listens for engines ("" otherwise). `worker` is the index within the engine
    (Topology.worker_index); it and `dp` are -1 where they mean nothing.

    The world ends with an `essential` member; only front-ends can be others, which come and go. A front-end `serves`
    these DP ranks only (None: all), and may be silent for `patience_seconds` as long as an engine's line to it stands:
    its interpreter is busy with something else, since a stopped process answers on no line.

    `node` as in Site. `generation` of the world that it was started for (0: it takes whichever it meets). A launcher
    beside the coordinator's says which DP `ranks` it starts, and in how many worlds it has been.
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
    generation: int = 0
    ranks: list[int] = []
    worlds: int = 0


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
    """Alive. `step` last entered, `phase` (in `layer`) where in it, `seconds` since then."""

    step: int
    phase: Phase
    seconds: float
    layer: int = 0


class Ack(msgspec.Struct, frozen=True, tag="ack"):
    """The coordinator heard your heartbeat and is alive itself."""


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


FromMember = (
    Hello
    | Heartbeat
    | StoreAt
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
ToMember = (
    Welcome
    | Refused
    | Ack
    | StoreAt
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
)


# --- front-ends <-> engines ------------------------------------------------------------------------------------


class EngineHello(msgspec.Struct, frozen=True, kw_only=True, tag="engine_hello"):
    """An engine's first word to a front-end."""

    dp: int
    num_blocks: int
    block_size: int
    max_model_len: int
    facts: dict[str, str] = {}
    load_seconds: dict[str, float] = {}


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """One sequence to generate (n choices are n of these). `max_tokens` in `sampling` is already settled.

    Sequences of one `group` (an HTTP request) share one turn; without a group a sequence has a turn of its own.
    """

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    group: str = ""


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Forget these requests; unknown ones are ignored."""

    request_ids: list[str]


class TokenEvent(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """New tokens of one request; the last event has a `finish_reason`.

    `stop_token` the end token that finished it (it is the last of `token_ids`). `logprobs` one per token if asked
    for. `prompt_logprobs` for prompt tokens 1..n-1, once, with the first event. `error` with reason "error": why it
    was refused, or with `failed` why the engine could not go on.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    failed: bool = False


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, tag="report", omit_defaults=True):
    """An engine's state, with its events and, as long as it is awake, every half second.

    Counters only grow, from the engine's start. `num_blocks` and `load_seconds` never change: an engine says them in
    its hello, and its front-end writes them in here.
    """

    step: int = 0
    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0
    free_blocks: int = 0
    num_blocks: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    steps: int = 0
    dummy_steps: int = 0
    naps: int = 0
    vote_seconds: float = 0.0
    votes: int = 0
    padding_tokens: int = 0
    all2all_seconds: float = 0.0
    load_seconds: dict[str, float] = {}


class Events(msgspec.Struct, frozen=True, tag="events"):
    """What one step gave a front-end, and how the engine stands now."""

    dp: int
    events: list[TokenEvent]
    report: LoadReport


class HeldAsk(msgspec.Struct, frozen=True, tag="held_ask"):
    """Which of these do you still have? Answered after everything that was said before on the same line."""

    number: int
    request_ids: list[str]


class HeldAnswer(msgspec.Struct, frozen=True, kw_only=True, tag="held_answer"):
    """All of question `number` but the `unknown` ones. `computed` counts the engine's steps that were not dummies."""

    dp: int
    number: int
    unknown: list[str]
    computed: int


ToEngine = Generate | Abort | HeldAsk
FromEngine = EngineHello | Events | HeldAnswer
