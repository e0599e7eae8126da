"""The engine process of one DP rank: joins the world, loads, agrees on the KV size, then takes turns for ever.

One loop thread; the link's and the front-ends' threads only put records into its inbox. Started as
`python -m moe_serve.engine.process` with a MemberSpec in the environment, by whoever likes.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

from moe_serve.base.balance_messages import DropStage, Record
from moe_serve.base.commands import Meeting, SetShares, StageExperts
from moe_serve.base.engine_messages import Abort, EngineHello, Generate, HeldAsk, ToEngine
from moe_serve.base.errors import (
    ConfigError,
    EngineDead,
    EngineError,
    MissingExtra,
    RankTimeout,
    RequestError,
    WorkerDied,
)
from moe_serve.base.log import setup_logging
from moe_serve.base.messages import (
    Drain,
    EngineAt,
    Failure,
    Hello,
    Ready,
    Stop,
    StoreAt,
    ToMember,
    Wake,
    WorldReady,
    WorldView,
)
from moe_serve.base.model_config import load_model_config
from moe_serve.base.progress import Phase, Progress
from moe_serve.engine.build import build_core, describe_loaded, make_hello
from moe_serve.engine.dp import DPRank
from moe_serve.engine.frontends import Frontends
from moe_serve.engine.owners import Owners
from moe_serve.engine.rearranging import Rearranging
from moe_serve.engine.reporting import Reporting
from moe_serve.engine.sockets import FrontendSockets, LineLost, LineStands
from moe_serve.eplb.first_placement import check_placement
from moe_serve.executor.base import Executor
from moe_serve.executor.choose import make_executor
from moe_serve.parallel.groups import control_group
from moe_serve.parallel.listeners import deafen, listeners
from moe_serve.parallel.stateless import open_store
from moe_serve.world.link import Link
from moe_serve.world.member import MemberSpec, end_all, started

MEET_SECONDS = 300.0
FAREWELL_SECONDS = 5.0
COLLECTIONS_PER_WINDOW = 20
STAGE_POLL_SECONDS = 0.01
log = logging.getLogger("moe_serve.engine.process")  # run as __main__, which is no child of moe_serve
FromFrontend = tuple[str, ToEngine | LineLost | LineStands]
"""With the address of the front-end."""


class EngineProcess:
    """`run()` returns only on failure; an orderly end comes from the coordinator and calls `end`, in any thread: the
    process must not outlive that."""

    def __init__(self, spec: MemberSpec, end: Callable[[int], None]) -> None:
        self._spec = spec
        self._end = end
        self._config = spec.load_config()
        self._progress = Progress()
        self._inbox: queue.SimpleQueue[ToMember | FromFrontend] = queue.SimpleQueue()
        self._owners = Owners()
        self._view = WorldView(engines=0)
        self._executor: Executor | None = None
        self._expert_bytes = 0
        self._store_doors: set[int] = set()
        self._link: Link | None = None

    def run(self) -> int:
        """Join, load, serve. The exit code of a failure, after the coordinator has been told what went wrong."""
        try:
            self._link = self._join()
            self._view = self._link.view
        except (ConfigError, RankTimeout) as error:
            log.error("%s", error)
            return 2 if isinstance(error, ConfigError) else 1
        try:
            self._serve(*self._load())
        except (ConfigError, MissingExtra) as error:
            return self._fail(Failure(str(error), config=True), 2)
        except EngineError as error:
            peer = not isinstance(error, WorkerDied | EngineDead)
            return self._fail(Failure(str(error), suspects_peer=peer), 1)
        except Exception as error:
            log.exception("the engine failed")
            return self._fail(Failure(f"{type(error).__name__}: {error}"), 1)

    def _join(self) -> Link:
        spec = self._spec
        hello = Hello(
            role="engine",
            dp=spec.dp,
            pid=os.getpid(),
            host=socket.gethostname(),
            agreement=self._config.agreement(),
            node=spec.site.node,
            machine=spec.site.machine,
            generation=spec.generation,
        )
        return Link(
            spec.host,
            spec.port,
            hello,
            token=spec.token,
            on_message=self._hear,
            on_lost=self._orphaned,
            progress=self._progress,
            connect_seconds=spec.connect_seconds,
        )

    def _hear(self, message: ToMember) -> None:
        """In the link's thread. Stop cannot wait for the loop, which may sit in a collective that never ends."""
        if isinstance(message, Stop):
            self._end(0 if message.code == 0 else 1)
        self._inbox.put(message)

    def _orphaned(self, why: str) -> None:
        log.error("%s; this engine ends", why)
        self._end(1)

    def _fail(self, failure: Failure, code: int) -> int:
        assert self._link is not None
        self._link.send(failure)
        time.sleep(FAREWELL_SECONDS)  # the coordinator's Stop normally ends this process first
        return code

    def _load(self) -> tuple[DPRank, EngineHello]:
        """Meet at the store, load the model on the workers, agree on the KV cache."""
        config, spec = self._config, self._spec
        parallel = config.parallel
        store = self._meet()
        meeting = Meeting(
            dp_rank=spec.dp,
            store_host=store.host,
            store_port=store.port,
            coordinator_host=spec.host,
            coordinator_port=spec.port,
            token=spec.token,
            site=spec.site,
            generation=self._view.generation,
        )
        model_config = load_model_config(Path(config.model.model or ""))
        check_placement(self._view.placement, parallel, model_config)
        self._executor = make_executor(config, meeting, self._progress, announce=self._announce)
        facts = self._executor.start()
        self._expert_bytes = facts.expert_bytes
        self._progress.enter(Phase.MEET_ENGINES)
        votes = control_group(
            "engines",
            spec.dp,
            range(self._view.engines),
            store_host=store.host,
            store_port=store.port,
            token=spec.token,
            timeout_seconds=config.scheduler.step_timeout_seconds * 1.5,
            generation=self._view.generation,
            shares_memory=parallel.all2all_backend == "shm",
        )
        num_blocks = votes.sync_kv_cache_blocks(facts.kv_blocks)
        core = build_core(self._executor, config, model_config, facts, num_blocks=num_blocks)
        rearranging = None
        if parallel.enable_eplb:
            interval = max(1, parallel.eplb_config.window_size // COLLECTIONS_PER_WINDOW)
            rearranging = Rearranging(self._executor, collect_interval=interval, generation=self._view.generation)
        rank = DPRank(core, votes, progress=self._progress, rearranging=rearranging, generation=self._view.generation)
        log.info("%s", describe_loaded(facts, core.pool))
        return rank, make_hello(spec.dp, facts, core)

    def _meet(self) -> StoreAt:
        """Engine 0 opens the store and tells; the others are told."""
        assert self._link is not None
        if self._spec.dp == 0:
            host = self._spec.site.address
            before = listeners()
            self._store, bound = open_store(
                host, self._config.parallel.data_parallel_master_port, is_master=True, token=self._spec.token
            )
            self._store_doors = listeners() - before
            found = StoreAt(host, bound)
            self._link.send(found)
            return found
        self._progress.enter(Phase.FIND_STORE)
        deadline = time.monotonic() + MEET_SECONDS
        while True:
            try:
                message = self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise RankTimeout(f"engine dp 0 opened no store within {MEET_SECONDS:g} s") from None
            if isinstance(message, StoreAt):
                return message
            self._take(message)

    def _announce(self, address: str) -> None:
        assert self._link is not None
        self._link.send(EngineAt(address))

    def _serve(self, rank: DPRank, hello: EngineHello) -> NoReturn:
        assert self._link is not None
        sockets = FrontendSockets(
            hello, lambda address, message: self._inbox.put((address, message)), token=self._spec.token
        )
        reporting = Reporting(self._spec.dp, self._owners, sockets, self._link)
        frontends = Frontends(self._spec.dp, self._owners, sockets, self._link)
        frontends.look(self._view, rank.core)
        self._link.send(Ready(expert_bytes=self._expert_bytes))
        gc.collect()
        gc.freeze()
        while True:
            self._take_in(rank, frontends, reporting)
            if not rank.naps.asleep:
                reporting.tell(rank.turn(), rank, frontends.addresses)
            self._pass_on_news(rank)

    def _take_in(self, rank: DPRank, frontends: Frontends, reporting: Reporting) -> None:
        """Everything in the inbox; while asleep, wait for something."""
        while rank.naps.asleep or not self._inbox.empty():
            if rank.naps.asleep:
                self._progress.enter(Phase.ASLEEP)  # again: workers may have been asked for something meanwhile
            message = self._next_message(rank)
            match message:
                case (str() as address, Generate() as request) if address in frontends.addresses:
                    self._accept(address, request, rank, reporting)
                case (str(), Abort() as abort):
                    rank.core.abort(abort.request_ids)
                    self._owners.forget(abort.request_ids)
                case (str() as address, HeldAsk() as ask) if address in frontends.addresses:
                    reporting.answer(address, ask, rank)
                case (str() as address, LineLost() | LineStands() as news):
                    frontends.hear_line(address, news, rank.core)
                case Wake() if message.generation == self._view.generation:
                    rank.naps.hear(message.nap)
                case Drain():
                    reporting.drain(rank)
                case WorldView():
                    self._view = message
                    frontends.look(message, rank.core)
                case StageExperts() | SetShares() | DropStage() | Record():
                    if rank.rearranging is not None:
                        rank.rearranging.hear(message)
                case None:
                    self._pass_on_news(rank)
                case _:
                    self._take(message)
            if rank.naps.asleep and rank.wants_turn:
                assert self._link is not None
                self._link.send(Wake(rank.naps.wake_up(), self._view.generation))

    def _next_message(self, rank: DPRank) -> ToMember | FromFrontend | None:
        """The next one; None after some progress with a rearrangement that goes on while the world sleeps."""
        if rank.rearranging is None or not rank.rearranging.active:
            return self._inbox.get()
        try:
            return self._inbox.get(timeout=STAGE_POLL_SECONDS)
        except queue.Empty:
            rank.rearranging.poll()
            return None

    def _pass_on_news(self, rank: DPRank) -> None:
        assert self._link is not None
        for news in () if rank.rearranging is None else rank.rearranging.take_news():
            self._link.send(news)

    def _take(self, message: ToMember | FromFrontend) -> None:
        """What may arrive before this engine serves."""
        if isinstance(message, WorldView):
            self._view = message
        elif isinstance(message, WorldReady):
            deafen(self._store_doors)  # all have met

    def _accept(self, address: str, request: Generate, rank: DPRank, reporting: Reporting) -> None:
        try:
            rank.core.add(request.request_id, request.token_ids, request.sampling, group=request.group)
            self._owners.add(request.request_id, address)
        except RequestError as error:
            reporting.refuse(address, request.request_id, str(error), rank)


def run_engine(spec: MemberSpec) -> int:
    """An engine in a process that is somebody else's, who ends it with this exit code."""
    ends: queue.SimpleQueue[int] = queue.SimpleQueue()

    def end(code: int) -> None:
        ends.put(code)
        threading.Event().wait()  # the thread has nothing to do any more, and must not go on

    setup_logging(f"engine dp={spec.dp}", spec.load_config().server.log_level)
    engine = EngineProcess(spec, end)
    threading.Thread(target=lambda: ends.put(engine.run()), name="engine", daemon=True).start()
    return ends.get()


def _end_process(spec: MemberSpec, code: int) -> NoReturn:
    """From any thread, at once. Workers would follow by themselves, but not before they have joined."""
    end_all(started(lambda other: other == spec))
    os._exit(code)


def main() -> NoReturn:
    spec = MemberSpec.from_environment()
    setup_logging(f"engine dp={spec.dp}", spec.load_config().server.log_level)
    end = partial(_end_process, spec)
    end(EngineProcess(spec, end).run())


if __name__ == "__main__":
    main()
