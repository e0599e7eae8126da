"""One process per tensor rank of an engine. The engine listens, workers come by address and token, orders go out.

Three threads besides the caller's: one takes replies, one per worker waits for its end. A worker that is gone fails
what is pending at once, whether it was seen as a child (exit code, signal) or by its closed connection.
"""

from __future__ import annotations

import hmac
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from moe_serve.base.commands import (
    Command,
    Failed,
    LoadModel,
    Meeting,
    Reply,
    StepPlan,
    WorkerFacts,
)
from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError, EngineError, RankTimeout, WorkerDied
from moe_serve.base.progress import Progress
from moe_serve.parallel.store import local_address
from moe_serve.worker import wire

JOIN_SECONDS = 120.0
LOAD_SECONDS = 3600.0
END_SECONDS = 3.0
GRACE_SECONDS = 0.5
MAX_JOIN_BYTES = 1 << 16
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Call:
    """An order under way: the caller's future and the replies so far, by tp rank."""

    future: Future[Reply] = field(default_factory=Future)
    replies: dict[int, Reply] = field(default_factory=dict)


@dataclass(slots=True)
class Seat:
    """One tensor rank's place: the process started for it, and once it has joined, who it is."""

    name: str
    process: subprocess.Popen[bytes]
    identity: bytes = b""
    pid: int = 0
    host: str = ""

    @property
    def who(self) -> str:
        return f"worker {self.name}, pid {self.pid or self.process.pid}"


class MultiprocessExecutor:
    """submit() may be called from one thread at a time; futures finish in a thread of the executor's own."""

    def __init__(self, config: Config, meeting: Meeting, progress: Progress) -> None:
        self._config = config
        self._meeting = meeting
        self._progress = progress
        self._context = zmq.Context()
        self._orders = wire.prepare(self._context.socket(zmq.ROUTER))
        self._answers = wire.prepare(self._context.socket(zmq.PULL))
        self._lock = threading.Lock()
        self._seats: list[Seat] = []
        self._calls: dict[int, Call] = {}
        self._number = 0
        self._failure: EngineError | None = None
        self._threads: list[threading.Thread] = []
        self._closing, self._wake = socket.socketpair()
        self._closed = False

    def start(self) -> WorkerFacts:
        started = time.perf_counter()
        self._progress.enter("start the workers")
        port, replies = self._listen()
        self._spawn(port)
        self._gather(replies)
        seconds = round(time.perf_counter() - started, 3)
        self._progress.enter("wait for the workers' reply: load")
        call = self._call(LoadModel())
        try:
            call.future.result(timeout=LOAD_SECONDS)
        except EngineError:
            raise
        except TimeoutError as error:
            raise RankTimeout(f"{self._missing(call)} did not load the model within {LOAD_SECONDS:g} s") from error
        return combine_facts([call.replies[tp] for tp in range(len(self._seats))], start_seconds=seconds)

    def submit(self, command: Command) -> Future[Reply]:
        step = command.step if isinstance(command, StepPlan) else None
        future = self._call(command).future
        self._progress.enter("wait for the workers' reply", step)
        return future

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._fail(EngineError("the executor is closed"))
        self._send_all(wire.encode(wire.End()))
        deadline = time.monotonic() + END_SECONDS
        for seat in self._seats:
            try:
                seat.process.wait(max(0.0, deadline - time.monotonic()) if seat.identity else 0)
            except subprocess.TimeoutExpired:
                seat.process.kill()
                seat.process.wait(END_SECONDS)
        self._wake.send(b"x")
        for thread in self._threads:
            thread.join(END_SECONDS)
        self._orders.close()
        self._answers.close()
        self._closing.close()
        self._wake.close()
        self._context.term()

    # -- coming together --

    def _listen(self) -> tuple[int, int]:
        """Bind both sockets on this machine's address on the way to the store; their ports."""
        self._host = local_address(self._meeting.store_host, self._meeting.store_port)
        shown = f"[{self._host}]" if ":" in self._host else self._host
        self._address = f"tcp://{shown}"
        self._orders.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._orders.setsockopt(zmq.MAXMSGSIZE, MAX_JOIN_BYTES)
        ports = [each.bind_to_random_port(self._address) for each in (self._orders, self._answers)]
        return ports[0], ports[1]

    def _spawn(self, port: int) -> None:
        topology = self._config.parallel.topology
        for tp in range(topology.tp):
            invitation = wire.Invitation(address=f"{self._address}:{port}", token=self._meeting.token, tp=tp)
            process = subprocess.Popen(
                [sys.executable, "-m", "moe_serve.worker.process"],
                env=invitation.to_environment(self._meeting.threads_per_rank),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            rank = topology.rank(dp=self._meeting.dp_rank, tp=tp)
            self._seats.append(Seat(topology.describe(rank), process))

    def _gather(self, replies: int) -> None:
        """Seat every worker that knows the token, then start to listen for replies and ends."""
        deadline = time.monotonic() + JOIN_SECONDS
        welcome = wire.encode(wire.Joined(config=self._config.to_json(), meeting=self._meeting, replies=replies))
        while absent := [seat for seat in self._seats if not seat.identity]:
            for seat in self._seats:
                if seat.process.poll() is not None:
                    raise _came_to_an_end(seat, "before it joined")
            if time.monotonic() > deadline:
                names = "; ".join(seat.who for seat in absent)
                raise RankTimeout(f"these workers did not join within {JOIN_SECONDS:g} s: {names}")
            if self._orders.poll(100):
                identity, message, *_ = self._orders.recv_multipart()
                self._seat(identity, message, welcome)
        monitor = self._orders.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._thread(self._receive, monitor)
        for seat in self._seats:
            self._thread(self._await_end, seat)

    def _seat(self, identity: bytes, message: bytes, welcome: bytes) -> None:
        try:
            join = wire.decode_join(message)
        except msgspec.MsgspecError:
            log.warning("ignored a message that is no hello of a worker")
            return
        if not hmac.compare_digest(join.token.encode(), self._meeting.token.encode()):
            refusal = "this token belongs to another world"
        elif not 0 <= join.tp < len(self._seats) or self._seats[join.tp].identity:
            refusal = f"tensor rank {join.tp} is taken or outside [0, {len(self._seats)})"
        else:
            seat = self._seats[join.tp]
            seat.identity, seat.pid, seat.host = identity, join.pid, join.host
            self._orders.send_multipart([identity, welcome])
            return
        log.warning("refused a worker: %s", refusal)
        self._orders.send_multipart([identity, wire.encode(wire.Rejected(refusal))])

    def _thread(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="executor", daemon=True)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    # -- orders and replies --

    def _call(self, command: Command) -> Call:
        call = Call()
        with self._lock:
            if self._failure is not None:
                call.future.set_exception(self._failure)
                return call
            self._number += 1
            self._calls[self._number] = call
            order = wire.encode(wire.Order(self._number, command))
        lost = self._send_all(order)
        self._blame(lost)
        return call

    def _send_all(self, message: bytes) -> list[Seat]:
        """To every worker that has joined; those that are not connected any more."""
        lost = []
        with self._lock:
            for seat in self._seats:
                if seat.identity:
                    try:
                        self._orders.send_multipart([seat.identity, message])
                    except zmq.ZMQError:
                        lost.append(seat)
        return lost

    def _receive(self, monitor: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        for source in (self._answers, monitor, self._closing):
            poller.register(source, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._answers in ready:
                self._take(self._answers.recv())
            elif monitor in ready:
                recv_monitor_message(monitor)
                self._blame(self._send_all(wire.encode(wire.Ping())))
            else:
                break
        self._orders.disable_monitor()
        monitor.close()

    def _take(self, message: bytes) -> None:
        try:
            answer = wire.decode_answer(message)
        except msgspec.MsgspecError:
            log.warning("ignored a message that is no worker's reply")
            return
        if not hmac.compare_digest(answer.token.encode(), self._meeting.token.encode()):
            log.warning("ignored a reply with another world's token")
            return
        with self._lock:
            call = self._calls.get(answer.number)
            if call is None:
                return
            call.replies[answer.tp] = answer.reply
            failed = isinstance(answer.reply, Failed)
            if failed or len(call.replies) == len(self._seats):
                del self._calls[answer.number]
            else:
                return
        if isinstance(answer.reply, Failed):
            call.future.set_exception(_error_of(self._seats[answer.tp], answer.reply))
        else:
            call.future.set_result(call.replies[0])

    # -- death --

    def _await_end(self, seat: Seat) -> None:
        """A worker that failed has said why; let its word arrive before its exit code counts."""
        if seat.process.wait() >= 0:
            time.sleep(GRACE_SECONDS)
        self._fail(_came_to_an_end(seat, "while it was needed"))

    def _blame(self, lost: list[Seat]) -> None:
        """A closed connection is mostly a death; the exit code then says more."""
        for seat in lost:
            try:
                seat.process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self._fail(WorkerDied(f"{seat.who} on {seat.host} closed its connection"))
            else:
                self._fail(_came_to_an_end(seat, "while it was needed"))

    def _fail(self, error: EngineError) -> None:
        """The first error stays; everything pending and everything to come gets it."""
        with self._lock:
            if self._failure is None:
                self._failure = error
            calls, self._calls = list(self._calls.values()), {}
        for call in calls:
            call.future.set_exception(self._failure)

    def _missing(self, call: Call) -> str:
        return "; ".join(seat.who for tp, seat in enumerate(self._seats) if tp not in call.replies)


def combine_facts(replies: list[Reply], *, start_seconds: float) -> WorkerFacts:
    """The least blocks, the sum of bytes held and read, the longest seconds. The checkpoint's size is its own."""
    facts = [reply for reply in replies if isinstance(reply, WorkerFacts)]
    assert len(facts) == len(replies), f"LoadModel was answered with {replies}"
    seconds = {"start the workers": start_seconds}
    for each in facts:
        for phase, value in each.load_seconds.items():
            seconds[phase] = max(seconds.get(phase, 0.0), value)
    return WorkerFacts(
        device=", ".join(dict.fromkeys(each.device for each in facts)),
        dtype=facts[0].dtype,
        kv_blocks=min(each.kv_blocks for each in facts),
        kv_block_bytes=sum(each.kv_block_bytes for each in facts),
        weight_bytes=sum(each.weight_bytes for each in facts),
        checkpoint_bytes_read=sum(each.checkpoint_bytes_read for each in facts),
        checkpoint_bytes_total=max(each.checkpoint_bytes_total for each in facts),
        load_seconds=seconds,
    )


def _error_of(seat: Seat, failed: Failed) -> ConfigError | EngineError:
    return ConfigError(failed.message) if failed.config else EngineError(f"{seat.who}: {failed.message}")


def _came_to_an_end(seat: Seat, when: str) -> WorkerDied:
    code = seat.process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return WorkerDied(f"{seat.who} {how} {when}")
