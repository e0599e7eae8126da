"""Workers outside the engine's process, whoever starts them: come together, give orders, book replies, fail as one.

What is particular to a way of starting is in a Starter. Two threads besides the caller's: one takes replies, one looks
for ends. A worker that is gone fails what is pending at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from moe_serve.base.commands import (
    AllocateKV,
    Command,
    Failed,
    LoadModel,
    Meeting,
    PollStage,
    Reply,
    SetShares,
    StageExperts,
    StepPlan,
    WorkerFacts,
)
from moe_serve.base.config import Config
from moe_serve.base.errors import EngineError, RankTimeout
from moe_serve.base.progress import Phase, Progress
from moe_serve.executor.lines import WorkerLines
from moe_serve.executor.replies import combine_facts, combine_replies
from moe_serve.executor.seats import Seat, name_missing
from moe_serve.executor.starting import Starter
from moe_serve.executor.watching import Watch
from moe_serve.worker import wire

JOIN_SECONDS = 120.0
LOAD_SECONDS = 3600.0
CONNECT_SECONDS = 2.0
"""The engine listens before a worker is started: one that cannot reach it is an orphan."""
END_SECONDS = 3.0
END_LOOK_SECONDS = 0.01
ADMIT_MILLISECONDS = 100


class Call(Future[Reply]):
    """An order under way, with the replies so far by worker. Out of patience, result() says who is missing."""

    def __init__(self, command: Command, seats: Sequence[Seat]) -> None:
        super().__init__()
        self.replies: dict[int, Reply] = {}
        self._command = command
        self._seats = seats

    def in_order(self) -> list[Reply]:
        return [self.replies[worker] for worker in range(len(self._seats))]

    def result(self, timeout: float | None = None) -> Reply:
        try:
            return super().result(timeout)
        except TimeoutError as error:
            if self.done():
                raise  # a RankTimeout that a worker met with
            missing = name_missing(self._seats, self.replies)
            raise RankTimeout(f"{missing} did not {_deed(self._command)} within {timeout:g} s") from error


class RemoteExecutor:
    """submit() may be called from one thread at a time; futures finish in a thread of the executor's own."""

    def __init__(
        self,
        config: Config,
        meeting: Meeting,
        progress: Progress,
        starter: Starter,
        *,
        join_seconds: float = JOIN_SECONDS,
    ) -> None:
        self._config = config
        self._meeting = meeting
        self._progress = progress
        self._starter = starter
        self._join_seconds = join_seconds
        self._topology = config.parallel.topology
        self._seats: list[Seat] = []
        self._lines = WorkerLines(meeting.token)
        self._watch = Watch(
            self._seats, await_closed=lambda seconds: self._lines.await_closed(self._seats, seconds), died=self._fail
        )
        self._lock = threading.Lock()
        self._calls: dict[int, Call] = {}
        self._number = 0
        self._failure: EngineError | None = None
        self._threads: list[threading.Thread] = []
        self._closed = False

    def start(self) -> WorkerFacts:
        started = time.perf_counter()
        self._progress.enter(Phase.START_WORKERS)
        self._come_together()
        seconds = round(time.perf_counter() - started, 3)
        self._progress.enter(Phase.REPLY)
        call = self._call(LoadModel())
        call.result(timeout=LOAD_SECONDS)
        return combine_facts(call.in_order(), start_seconds=seconds)

    def submit(self, command: Command) -> Future[Reply]:
        call = self._call(command)
        self._progress.enter(Phase.REPLY, step=command.step if isinstance(command, StepPlan) else None)
        return call

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._fail(EngineError("the executor is closed"))
        self._end_workers()
        self._watch.stop()
        self._lines.wake()
        for thread in self._threads:
            thread.join(END_SECONDS)
        self._lines.close()

    # -- coming together --

    def _come_together(self) -> None:
        """Listen on this machine's own address, have workers started, seat all of them."""
        meeting = self._meeting
        address, replies = self._lines.listen(meeting.site.address)
        for worker in range(self._topology.num_workers):
            invitation = wire.Invitation(
                address=address,
                token=meeting.token,
                worker=worker,
                threads=meeting.site.threads,
                connect_seconds=CONNECT_SECONDS,
            )
            name = self._topology.describe(self._topology.worker_rank(meeting.dp_rank, worker))
            self._seats.append(Seat(name, self._starter.start(worker, invitation)))
        told = replace(meeting, token="")
        self._gather(wire.encode(wire.Joined(config=self._config.to_json(), meeting=told, replies=replies)))
        self._lines.watch_connections()
        self._threads = [self._lines.receive(self._take), self._watch.start()]

    def _gather(self, welcome: bytes) -> None:
        deadline = time.monotonic() + self._join_seconds
        while absent := [seat for seat in self._seats if not seat.identity]:
            for seat in self._seats:
                if death := seat.death("before all had joined"):
                    raise death
            if time.monotonic() > deadline:
                names = "; ".join(seat.who for seat in absent)
                raise RankTimeout(f"these workers did not join within {self._join_seconds:g} s: {names}")
            self._lines.admit(self._seats, welcome, ADMIT_MILLISECONDS)

    def _end_workers(self) -> None:
        """Let them go, and those that have not gone in time, or never came, be killed by who can."""
        self._lines.send(self._seats, wire.End())
        deadline = time.monotonic() + END_SECONDS
        for seat in self._seats:
            while _is_here(seat) and time.monotonic() < deadline:
                time.sleep(END_LOOK_SECONDS)
            if seat.started.poll() is None:
                seat.started.kill()

    # -- orders and replies --

    def _call(self, command: Command) -> Call:
        call = Call(command, self._seats)
        with self._lock:
            if self._failure is not None:
                call.set_exception(self._failure)
                return call
            self._number += 1
            self._calls[self._number] = call
            order = wire.Order(self._number, command)
        self._watch.note(self._lines.send(self._seats, order))
        return call

    def _take(self, told: wire.WorkerReply) -> None:
        with self._lock:
            call = self._calls.get(told.number)
            if call is None or not 0 <= told.worker < len(self._seats):
                return
            call.replies[told.worker] = told.reply
            if not isinstance(told.reply, Failed) and len(call.replies) < len(self._seats):
                return
            del self._calls[told.number]
        if isinstance(told.reply, Failed):
            seat = self._seats[told.worker]
            call.set_exception(self._watch.cause(seat, told.reply.to_error(seat.who)))
        else:
            call.set_result(combine_replies(call.in_order(), sampling_worker=self._topology.sampling_worker))

    def _fail(self, error: EngineError) -> None:
        """The first error stays; everything pending and everything to come gets it."""
        with self._lock:
            if self._failure is None:
                self._failure = error
            calls, self._calls = list(self._calls.values()), {}
        for call in calls:
            call.set_exception(self._failure)


def _is_here(seat: Seat) -> bool:
    return bool(seat.identity) and seat.gone_since is None and seat.started.poll() is None


def _deed(command: Command) -> str:
    match command:
        case StepPlan():
            return f"finish step {command.step} (--step-timeout-seconds)"
        case AllocateKV():
            return "make the KV cache"
        case StageExperts() | PollStage() | SetShares():
            return "take up a rearrangement of experts"
        case LoadModel():
            return "load the model"
