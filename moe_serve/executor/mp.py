"""One process per tensor rank of an engine. The engine listens, workers come by address and token, orders go out.

Threads besides the caller's: one takes replies, one per worker waits for its end. A worker that is gone fails what is
pending at once, whether it was seen as a child (exit code, signal) or by its closed connection.
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
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

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
    StageStatus,
    StepPlan,
    StepResult,
    WorkerFacts,
)
from moe_serve.base.config import Config
from moe_serve.base.errors import EngineError, MoEServeError, RankTimeout, WorkerDied
from moe_serve.base.progress import Progress
from moe_serve.parallel.store import local_address
from moe_serve.worker import wire

JOIN_SECONDS = 120.0
LOAD_SECONDS = 3600.0
CONNECT_SECONDS = 2.0
"""The engine listens before it starts a worker: one that cannot reach it is an orphan."""
END_SECONDS = 3.0
GRACE_SECONDS = 0.5
PROBES = 5
PROBE_MILLISECONDS = 100
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Seat:
    """One tensor rank's place: the process started for it, and once it has joined, who it is."""

    name: str
    process: subprocess.Popen[bytes]
    identity: bytes = b""
    host: str = "this machine"

    @property
    def who(self) -> str:
        return f"worker {self.name}, pid {self.process.pid} on {self.host}"


class Call(Future[Reply]):
    """An order under way, with the replies so far by tp rank. Out of patience, result() says who is missing."""

    def __init__(self, command: Command, seats: list[Seat]) -> None:
        super().__init__()
        self.replies: dict[int, Reply] = {}
        self._command = command
        self._seats = seats

    def result(self, timeout: float | None = None) -> Reply:
        try:
            return super().result(timeout)
        except TimeoutError as error:
            if self.done():
                raise  # a RankTimeout that a worker met with
            raise RankTimeout(f"{self._missing()} did not {_deed(self._command)} within {timeout:g} s") from error

    def _missing(self) -> str:
        """Workers without a reply. The others may only be waiting for one that is stopped."""
        missing = [seat for tp, seat in enumerate(self._seats) if tp not in self.replies]
        stopped = [f"{seat.who} (stopped)" for seat in missing if _is_stopped(seat.process.pid)]
        return "; ".join(stopped or [seat.who for seat in missing])


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
        door, replies = self._listen()
        self._spawn(door)
        self._gather(replies)
        seconds = round(time.perf_counter() - started, 3)
        self._progress.enter("wait for the workers' reply: load")
        call = self._call(LoadModel())
        call.result(timeout=LOAD_SECONDS)
        return combine_facts([call.replies[tp] for tp in range(len(self._seats))], start_seconds=seconds)

    def submit(self, command: Command) -> Future[Reply]:
        call = self._call(command)
        self._progress.enter("wait for the workers' reply", command.step if isinstance(command, StepPlan) else None)
        return call

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

    def _listen(self) -> tuple[str, int]:
        """Bind both sockets on this machine's address on the way to the store: the door, and the port for replies."""
        host = local_address(self._meeting.store_host, self._meeting.store_port)
        shown = f"[{host}]" if ":" in host else host
        self._orders.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._orders.setsockopt(zmq.MAXMSGSIZE, wire.MAX_JOIN_BYTES)
        self._orders.setsockopt(zmq.RCVHWM, 8)  # who comes after all seats are taken is not listened to
        self._answers.setsockopt(zmq.MAXMSGSIZE, wire.MAX_ANSWER_BYTES)
        doors = []
        for each in (self._orders, self._answers):
            each.bind(f"tcp://{shown}:0")
            doors.append(each.get_string(zmq.LAST_ENDPOINT).rstrip("\0"))
        return doors[0], int(doors[1].rpartition(":")[2])

    def _spawn(self, door: str) -> None:
        topology = self._config.parallel.topology
        for tp in range(topology.tp):
            invitation = wire.Invitation(
                address=door, token=self._meeting.token, tp=tp, connect_seconds=CONNECT_SECONDS
            )
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
                    raise _came_to_an_end(seat, "before all had joined")
            if time.monotonic() > deadline:
                names = "; ".join(seat.who for seat in absent)
                raise RankTimeout(f"these workers did not join within {JOIN_SECONDS:g} s: {names}")
            if self._orders.poll(100):
                identity, message, *_ = self._orders.recv_multipart()
                self._seat(identity, message, welcome)
        monitor = self._orders.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._thread(lambda: self._receive(monitor))
        for seat in self._seats:
            self._thread(lambda seat=seat: self._await_end(seat))  # type: ignore[misc]

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
            seat.identity, seat.host = identity, join.host
            self._orders.send_multipart([identity, welcome])
            return
        log.warning("refused a worker: %s", refusal)
        self._orders.send_multipart([identity, wire.encode(wire.Rejected(refusal))])

    def _thread(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name="executor", daemon=True)
        thread.start()
        self._threads.append(thread)

    # -- orders and replies --

    def _call(self, command: Command) -> Call:
        call = Call(command, self._seats)
        with self._lock:
            if self._failure is not None:
                call.set_exception(self._failure)
                return call
            self._number += 1
            self._calls[self._number] = call
            order = wire.encode(wire.Order(self._number, command))
        self._blame(self._send_all(order))
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
        """Until closed. A closed connection is told without a name, so everybody is pinged to find out whose it was."""
        poller = zmq.Poller()
        for source in (self._answers, monitor, self._closing):
            poller.register(source, zmq.POLLIN)
        probes = 0
        while True:
            ready = dict(poller.poll(PROBE_MILLISECONDS if probes else None))
            if self._answers in ready:
                self._take(self._answers.recv())
            elif self._closing.fileno() in ready:
                break
            elif monitor in ready:
                recv_monitor_message(monitor)
                probes = PROBES  # it may take a moment until sending fails
            if probes:
                probes -= 1
                self._blame(self._send_all(wire.encode(wire.Ping())))
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
            if call is None or not 0 <= answer.tp < len(self._seats):
                return
            call.replies[answer.tp] = answer.reply
            if not isinstance(answer.reply, Failed) and len(call.replies) < len(self._seats):
                return
            del self._calls[answer.number]
        if isinstance(answer.reply, Failed):
            call.set_exception(self._cause(answer.tp, answer.reply))
        else:
            call.set_result(combine_replies([call.replies[tp] for tp in range(len(self._seats))]))

    def _cause(self, tp: int, failed: Failed) -> MoEServeError:
        """A worker that failed in an exchange may have met with another's death, which is known a moment later."""
        error = failed.to_error(self._seats[tp].who)
        deadline = time.monotonic() + GRACE_SECONDS
        while isinstance(error, EngineError) and time.monotonic() < deadline:
            for other, seat in enumerate(self._seats):
                if other != tp and (seat.process.poll() or 0) < 0:
                    return _came_to_an_end(seat, "while it was needed")
            time.sleep(0.01)
        return error

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
                stopped = " (it is stopped)" if _is_stopped(seat.process.pid) else ""
                self._fail(WorkerDied(f"{seat.who} closed its connection or fell silent{stopped}"))
            else:
                self._fail(_came_to_an_end(seat, "while it was needed"))

    def _fail(self, error: EngineError) -> None:
        """The first error stays; everything pending and everything to come gets it."""
        with self._lock:
            if self._failure is None:
                self._failure = error
            calls, self._calls = list(self._calls.values()), {}
        for call in calls:
            call.set_exception(self._failure)


def combine_replies(replies: list[Reply]) -> Reply:
    """What tp rank 0 answers, but a stage of experts is as far as the last of the workers."""
    first = replies[0]
    if isinstance(first, StepResult):
        stages = [reply.stage for reply in replies if isinstance(reply, StepResult) and reply.stage is not None]
        return msgspec.structs.replace(first, stage=_combine_stages(stages, len(replies))) if stages else first
    if isinstance(first, StageStatus):
        return _combine_stages([reply for reply in replies if isinstance(reply, StageStatus)], len(replies))
    return first


def _combine_stages(stages: list[StageStatus], num_workers: int) -> StageStatus:
    return StageStatus(
        epoch=max(stage.epoch for stage in stages),
        staged=len(stages) == num_workers and all(stage.staged for stage in stages),
        failed=next((stage.failed for stage in stages if stage.failed), ""),
        pieces_posted=max(stage.pieces_posted for stage in stages),
        bytes_received=sum(stage.bytes_received for stage in stages),
        seconds=max(stage.seconds for stage in stages),
    )


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
        expert_bytes=max(each.expert_bytes for each in facts),
        checkpoint_bytes_read=sum(each.checkpoint_bytes_read for each in facts),
        checkpoint_bytes_total=max(each.checkpoint_bytes_total for each in facts),
        load_seconds=seconds,
    )


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


def _came_to_an_end(seat: Seat, when: str) -> WorkerDied:
    code = seat.process.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return WorkerDied(f"{seat.who} {how} {when}")


def _is_stopped(pid: int) -> bool:
    """Whether a process of this machine is stopped, as far as Linux says."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False
