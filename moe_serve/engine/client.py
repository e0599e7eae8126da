"""A front-end's async handle on all engines: submit, stream, abort, liveness. Torch-free.

It listens, the engines connect and show the world's token; requests go out and events come in on one socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial

import msgspec
import zmq
import zmq.asyncio

from moe_serve.base.config import Config
from moe_serve.base.engine_messages import (
    Abort,
    EngineHello,
    Events,
    FromEngine,
    Generate,
    HeldAnswer,
    LoadReport,
    ToEngine,
    TokenEvent,
)
from moe_serve.base.errors import EngineDead
from moe_serve.base.messages import UNREADABLE, WorldView
from moe_serve.base.sampling import SamplingParams
from moe_serve.base.site import with_port
from moe_serve.base.sockets import prepare
from moe_serve.engine.admission import EngineRoom
from moe_serve.engine.board import NoticeBoard
from moe_serve.engine.overdue import LOOK_SECONDS, QUIET_SECONDS, Overdue
from moe_serve.engine.router import Balancer
from moe_serve.engine.streams import SubmittedStream

MAX_EVENTS_BYTES = 1 << 28  # of one step of one engine: log-probabilities of its prompts, most of all
TURNS_OF_PATIENCE = 3
"""In step time-outs: an engine takes a vote and a step between two answers, and the world ends if they take longer."""
log = logging.getLogger(__name__)


class EngineClient:
    """AsyncEngines over ZMQ. `bind()`, `meet()` the world, `run()` as a task, then `wait_ready()`.

    Requests go to the DP ranks in `serves` only (None: all); the engines of others do not connect. An engine is asked
    after requests of which nothing is heard for `quiet` seconds (engine/overdue.py). It shares the `board` with the
    other front-ends of its launcher.
    """

    def __init__(
        self,
        config: Config,
        *,
        token: str,
        serves: Sequence[int] | None = None,
        quiet: float = QUIET_SECONDS,
        board: NoticeBoard | None = None,
    ) -> None:
        self._board = board
        self._serves = serves
        self._view: WorldView | None = None
        self._scheduler, self._block_size = config.scheduler, config.cache.block_size
        self._context = zmq.asyncio.Context()
        self._socket = prepare(self._context.socket(zmq.ROUTER), token, listens=True, max_bytes=MAX_EVENTS_BYTES)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._balancer = self._make_balancer(0)
        limit = TURNS_OF_PATIENCE * config.scheduler.step_timeout_seconds
        self._quiet = quiet
        self._overdue = Overdue(clock=time.monotonic, limit=limit, quiet=quiet)
        self._hellos: dict[int, EngineHello] = {}
        self._identities: dict[int, bytes] = {}
        self._ranks: dict[bytes, int] = {}
        self._queues: dict[str, asyncio.Queue[TokenEvent | EngineDead]] = {}
        self._reports: dict[int, LoadReport] = {}
        self._all_here = asyncio.Event()
        self._dead_reason: str | None = None

    def bind(self, host: str) -> str:
        """Listen on a free port of `host`; the address engines must connect to."""
        self._socket.bind(f"tcp://{with_port(host, 0)}")
        return self._socket.get_string(zmq.LAST_ENDPOINT)

    def meet(self, view: WorldView) -> None:
        """How the world looks: at first, before requests, and whenever it has changed."""
        if self._view is None:
            self._balancer = self._make_balancer(view.engines)
        self._view = view
        served = set(self.served)
        sharing = [each for each in view.frontends if each.serves is None or served & set(each.serves)]
        self._balancer.shared = len(sharing) > (1 if self._board is None else self._board.num_slots)
        self._count_engines()

    @property
    def ready(self) -> bool:
        return self._all_here.is_set() and self.alive

    @property
    def alive(self) -> bool:
        return self._dead_reason is None

    @property
    def dead_reason(self) -> str | None:
        return self._dead_reason

    @property
    def data_parallel_size(self) -> int:
        return 0 if self._view is None else self._view.engines

    @property
    def served(self) -> Collection[int]:
        """See AsyncEngines.served."""
        return range(self.data_parallel_size) if self._serves is None else self._serves

    @property
    def max_model_len(self) -> int:
        return min(hello.max_model_len for hello in self._hellos.values())

    @property
    def reports(self) -> Mapping[int, LoadReport]:
        board = self._board
        if board is None:
            return self._reports
        known = {dp: self._reports.get(dp) or self._complete(dp, LoadReport()) for dp in self._hellos}
        return {dp: board.newest(dp, each) for dp, each in known.items() if dp in self._reports or board.knows(dp)}

    @property
    def running(self) -> Mapping[int, Mapping[str, str]]:
        return {rank: hello.facts for rank, hello in sorted(self._hellos.items())}

    @property
    def room(self) -> EngineRoom:
        """See AsyncEngines.room."""
        hellos = list(self._hellos.values())
        tokens = sum(hello.num_blocks * hello.block_size for hello in hellos)
        return EngineRoom(self._scheduler.max_num_seqs * len(hellos), tokens)

    @property
    def num_unfinished(self) -> int:
        return len(self._queues)

    async def wait_ready(self) -> None:
        """Until every engine that this front-end serves has connected."""
        await self._all_here.wait()

    async def run(self) -> None:
        """Receive for ever, and look after requests of which nothing comes; what cannot be read is dropped."""
        await asyncio.gather(self._receive(), self._look())

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            message = self._read(frames[1:])
            if isinstance(message, EngineHello):
                self._welcome(frames[0], message)
            elif message is None or self._ranks.get(frames[0]) != message.dp:
                continue
            elif isinstance(message, HeldAnswer):
                self._give_up(self._overdue.answered(message))
            else:
                self._deliver(message)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(min(LOOK_SECONDS, self._quiet))
            asks, lost = self._overdue.look()
            self._give_up(lost)
            for rank, ask in asks.items():
                with contextlib.suppress(TimeoutError):  # a line that takes nothing will not answer in time either
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._send(rank, ask)

    def _give_up(self, lost: Mapping[str, str]) -> None:
        """End these requests with these reasons."""
        for request_id, reason in lost.items():
            log.error("gave up request %s: %s", request_id, reason)
            self._overdue.ended(request_id)
            self._queues[request_id].put_nowait(EngineDead(reason))

    def _read(self, frames: Sequence[bytes]) -> FromEngine | None:
        """A record; None where a stranger's bytes are none, whatever they are."""
        try:
            if len(frames) != 1:
                raise ValueError(f"{len(frames)} frames instead of one")
            return self._decoder.decode(frames[0])
        except (*UNREADABLE, ValueError) as error:
            log.warning("dropped a malformed record from an engine socket: %s", error)
            return None

    async def submit(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: SamplingParams,
        *,
        dp_rank: int | None = None,
        group: str = "",
    ) -> SubmittedStream:
        """See AsyncEngines.submit."""
        self._check_alive()
        rank = self._balancer.choose(len(token_ids), self._reports, pinned=dp_rank)
        events: asyncio.Queue[TokenEvent | EngineDead] = asyncio.Queue()
        self._queues[request_id] = events
        self._balancer.sent(request_id, rank, len(token_ids))
        self._overdue.sent(request_id, rank)
        stream = SubmittedStream(rank, events, partial(self._leave, request_id, rank))
        try:
            message = Generate(request_id=request_id, token_ids=token_ids, sampling=sampling, group=group)
            await self._send(rank, message)
        except BaseException:  # a caller that is cancelled here has no stream to close
            await stream.aclose()
            raise
        return stream

    async def _leave(self, request_id: str, rank: int, finished: bool) -> None:
        del self._queues[request_id]
        self._balancer.finished(request_id)
        self._overdue.ended(request_id)
        if not finished and self.alive:
            await self._send(rank, Abort([request_id]))

    def fail(self, reason: str) -> None:
        """The world broke: end every stream with EngineDead(reason)."""
        if self._dead_reason is None:
            self._dead_reason = reason
            for events in self._queues.values():
                events.put_nowait(EngineDead(reason))

    def close(self) -> None:
        """Close the socket."""
        self._context.destroy(linger=0)

    def _check_alive(self) -> None:
        if self._dead_reason is not None:
            raise EngineDead(self._dead_reason)

    def _welcome(self, identity: bytes, hello: EngineHello) -> None:
        before = self._identities.get(hello.dp)
        if before is not None:
            self._line_lost(before, hello.dp)
        self._hellos[hello.dp] = hello
        self._identities[hello.dp] = identity
        self._ranks[identity] = hello.dp
        self._count_engines()

    def _line_lost(self, identity: bytes, rank: int) -> None:
        """An engine is back after its connection was lost; nobody knows what of its streams was on the way."""
        del self._ranks[identity]
        self._overdue.line_lost(rank)
        reason = f"the connection to DP rank {rank} was lost and stands again; send the request once more"
        log.error("%s", reason)
        for request_id in self._balancer.on_rank(rank):
            self._queues[request_id].put_nowait(EngineDead(reason))

    def _count_engines(self) -> None:
        if self._view is not None and self._hellos.keys() >= set(self.served):
            self._all_here.set()

    def _make_balancer(self, num_ranks: int) -> Balancer:
        return Balancer(
            num_ranks,
            max_num_seqs=self._scheduler.max_num_seqs,
            max_num_batched_tokens=self._scheduler.max_num_batched_tokens,
            block_size=self._block_size,
            serves=self._serves,
            clock=time.monotonic,
            board=self._board,
        )

    def _deliver(self, message: Events) -> None:
        self._reports[message.dp] = report = self._complete(message.dp, message.report)
        if self._board is not None:
            self._board.reported(message.dp, report)
        for event in message.events:
            self._balancer.progressed(event.request_id, len(event.token_ids))
            self._note(event)
            events = self._queues.get(event.request_id)
            if events is not None:
                events.put_nowait(event)

    def _complete(self, dp: int, report: LoadReport) -> LoadReport:
        """With what never changes."""
        hello = self._hellos[dp]
        return msgspec.structs.replace(report, num_blocks=hello.num_blocks, load_seconds=hello.load_seconds)

    def _note(self, event: TokenEvent) -> None:
        """After its last event a stream may stay open for as long as a client reads."""
        if event.finish_reason is None:
            self._overdue.heard(event.request_id)
        else:
            self._overdue.ended(event.request_id)

    async def _send(self, rank: int, message: ToEngine) -> None:
        try:
            await self._socket.send_multipart([self._identities[rank], self._encoder.encode(message)])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            if isinstance(message, Generate):  # else nobody waits for it
                raise EngineDead(f"DP rank {rank} cannot be reached now; send the request once more") from error
