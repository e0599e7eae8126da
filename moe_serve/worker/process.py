"""A worker in a process of its own. Joins its engine and its world by address, then carries out commands.

Started as `python -m moe_serve.worker.process` with a wire.Invitation in the environment, by whoever likes. It ends
the moment its engine or the coordinator is gone, whatever its main thread is doing: no orphan, no common parent.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import threading
from dataclasses import replace

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from moe_serve.base.commands import AllocateKV, Command, Failed, Reply
from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError, EngineError, MoEServeError, RankTimeout
from moe_serve.base.log import setup_logging
from moe_serve.base.messages import UNREADABLE, Hello, Stop, ToMember
from moe_serve.base.progress import Phase, Progress
from moe_serve.base.sockets import prepare
from moe_serve.base.topology import Topology
from moe_serve.worker import wire
from moe_serve.worker.choose import make_worker
from moe_serve.worker.worker import Worker
from moe_serve.world.link import Link

FAREWELL_MILLISECONDS = 2_000
ANSWER_SECONDS = 30.0
log = logging.getLogger("moe_serve.worker.process")  # run as __main__, which is no child of moe_serve


class EngineLine:
    """The two sockets to the engine: orders come on one, answers go on the other. Used by the main thread."""

    def __init__(self, invitation: wire.Invitation) -> None:
        self._invitation = invitation
        self._orders = prepare(zmq.Context().socket(zmq.DEALER), invitation.token, listens=False)
        # A context of its own, so that flush() waits for these messages and for nothing else.
        self._answers = prepare(zmq.Context().socket(zmq.PUSH), invitation.token, listens=False)
        self._monitor = self._orders.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)

    @property
    def model(self) -> str | None:
        return self._invitation.model

    def join(self) -> wire.Joined:
        """Say hello and be told everything. RankTimeout if nobody answers, ConfigError if the engine says no."""
        invitation = self._invitation
        where = f"the engine at {invitation.address}"
        self._orders.connect(invitation.address)
        if not self._monitor.poll(int(invitation.connect_seconds * 1000)):
            raise RankTimeout(f"{where} could not be reached within {invitation.connect_seconds:g} s")
        recv_monitor_message(self._monitor)
        hello = wire.Join(worker=invitation.worker, pid=os.getpid(), host=socket.gethostname())
        self._orders.send(wire.encode(hello))
        self._await_answer(where)
        answer = self.receive()
        if isinstance(answer, wire.Rejected):
            raise ConfigError(answer.reason)
        if not isinstance(answer, wire.Joined):
            raise EngineError(f"{where} answered a hello with {type(answer).__name__}")
        host, _, _ = invitation.address.rpartition(":")
        self._answers.connect(f"{host}:{answer.replies}")
        site = invitation.site or answer.meeting.site
        return msgspec.structs.replace(answer, meeting=replace(answer.meeting, token=invitation.token, site=site))

    def _await_answer(self, where: str) -> None:
        poller = zmq.Poller()
        poller.register(self._orders, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        ready = dict(poller.poll(int(ANSWER_SECONDS * 1000)))
        if self._orders not in ready:
            raise RankTimeout(f"{where} " + ("is gone" if ready else f"did not answer within {ANSWER_SECONDS:g} s"))

    def await_end(self) -> None:
        """Return when the engine is gone. In a thread of its own, after join()."""
        while recv_monitor_message(self._monitor)["event"] != zmq.EVENT_DISCONNECTED:
            pass

    def receive(self) -> wire.ToWorker:
        """Wait for the engine's next word; that the engine lives is the monitor's concern.

        EngineError for what cannot be read: it may have been an order, and nobody would carry it out.
        """
        try:
            return wire.decode_to_worker.decode(self._orders.recv())
        except UNREADABLE as error:
            raise EngineError(f"the engine at {self._invitation.address} sent what is no order: {error}") from error

    def answer(self, number: int, reply: Reply) -> None:
        told = wire.WorkerReply(worker=self._invitation.worker, number=number, reply=reply)
        self._answers.send(wire.encode(told))

    def flush(self) -> None:
        """Deliver what was said last, within two seconds."""
        self._answers.close(linger=FAREWELL_MILLISECONDS)
        self._answers.context.term()


class WorkerProcess:
    """`run()` returns an exit code where joining failed or a command broke us; an orderly end exits at once."""

    def __init__(self, invitation: wire.Invitation) -> None:
        self._worker = invitation.worker
        self._progress = Progress()
        self._line = EngineLine(invitation)
        self._link: Link | None = None

    def run(self) -> int:
        try:
            joined = self._line.join()
        except MoEServeError as error:
            log.error("%s", error)
            return 2 if isinstance(error, ConfigError) else 1
        threading.Thread(target=self._watch_engine, name="engine-watch", daemon=True).start()
        config = Config.model_validate_json(joined.config)
        if self._line.model is not None:
            config = config.with_("model", model=self._line.model)
        setup_logging(_place(config.parallel.topology, joined.meeting.dp_rank, self._worker), config.server.log_level)
        try:
            self._link = self._join_world(joined)
        except MoEServeError as error:
            return self._decline(error)
        try:
            worker = make_worker(config, joined.meeting, self._worker, self._progress)
        except MoEServeError as error:
            return self._decline(error)
        try:
            return self._serve(worker)
        except EngineError as error:
            log.error("%s; this worker ends", error)
            return 1

    def _decline(self, error: MoEServeError) -> int:
        """The engine hears with its first order why this worker is of no use."""
        while not isinstance(message := self._line.receive(), wire.Order):
            pass
        self._line.answer(message.number, Failed.of(error))
        self._line.flush()
        return 1

    def _join_world(self, joined: wire.Joined) -> Link | None:
        """None where the world has no coordinator; then the engine's line alone tells of its end."""
        meeting = joined.meeting
        if not meeting.coordinator_host:
            return None
        hello = Hello(
            role="worker",
            dp=meeting.dp_rank,
            worker=self._worker,
            pid=os.getpid(),
            host=socket.gethostname(),
            node=meeting.site.node,
            generation=meeting.generation,
        )
        return Link(
            meeting.coordinator_host,
            meeting.coordinator_port,
            hello,
            token=meeting.token,
            on_message=self._hear,
            on_lost=lambda why: self._end(1, why),
            progress=self._progress,
        )

    def _serve(self, worker: Worker) -> int:
        while True:
            self._progress.enter(Phase.ASLEEP)
            message = self._line.receive()
            match message:
                case wire.Order(number, command):
                    try:
                        reply = self._carry_out(worker, command)
                    except Exception as error:  # the outermost loop of a process: log, report, end
                        log.exception("the worker failed in phase %r", self._progress.place)
                        self._line.answer(number, Failed.of(error))
                        self._line.flush()
                        return 1
                    self._line.answer(number, reply)
                case wire.End():
                    self._end(0, "")
                case _:
                    pass

    def _carry_out(self, worker: Worker, command: Command) -> Reply:
        try:
            reply = worker.handle(command)
        except MoEServeError as error:
            return Failed.of(error)
        if isinstance(command, AllocateKV):
            # The model and all modules are here to stay: no collection has to look at them again.
            gc.collect()
            gc.freeze()
        return reply

    def _hear(self, message: ToMember) -> None:
        """In the link's thread. The main thread may sit in a collective that never ends."""
        if isinstance(message, Stop):
            self._end(0 if message.code == 0 else 1, "")

    def _watch_engine(self) -> None:
        """The kernel closes the connection when the engine dies, so this is noticed at once."""
        self._line.await_end()
        self._end(1, "the engine is gone; this worker ends")

    def _end(self, code: int, why: str) -> None:
        """From any thread. Leaves the world on purpose, so that whoever died first is the one who gets named."""
        if why:
            log.error("%s", why)
        if self._link is not None:
            self._link.close(why)
        os._exit(code)


def _place(topology: Topology, dp: int, worker: int) -> str:
    _, pp, tp = topology.coordinates(topology.worker_rank(dp, worker))
    return f"worker dp={dp}" + (f" pp={pp}" if topology.pp > 1 else "") + f" tp={tp}"


def run_worker(invitation: wire.Invitation) -> int:
    """This process's main thread as a worker; see WorkerProcess.run."""
    setup_logging(f"worker {invitation.worker}")
    return WorkerProcess(invitation).run()


if __name__ == "__main__":
    code = run_worker(wire.Invitation.from_environment(os.environ))
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)  # threads of torch and of the link must not keep a failed worker
