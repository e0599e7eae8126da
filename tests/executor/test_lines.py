"""An engine's sockets for its workers, and a worker's for its engine, when what comes is no record. Real sockets."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import zmq

from moe_serve.base.commands import Done
from moe_serve.base.errors import EngineError
from moe_serve.base.site import with_port
from moe_serve.base.sockets import prepare
from moe_serve.executor.lines import WorkerLines
from moe_serve.executor.seats import Seat
from moe_serve.executor.starting import StartedElsewhere
from moe_serve.worker import wire
from moe_serve.worker.process import EngineLine
from tests.support.ipv6 import why_no_ipv6

TOKEN = "token of a test world"
WAIT_SECONDS = 10.0
MILLISECONDS = round(WAIT_SECONDS * 1000)
NO_TEXT = b"\x81\xa4type\xa4\xff\xfe\xfd\xfc"
DEEP = b"\x81\xa1x" + b"\x91" * 50_000
NONSENSE = [b"", b"\xc1", NO_TEXT, DEEP]


@contextmanager
def connected(kind: int, address: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, prepare(context.socket(kind), TOKEN, listens=False) as made:
        made.connect(address)
        yield made


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_nonsense_takes_no_seat_and_ends_no_thread_and_a_worker_and_its_replies_still_come(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    if host == "::1" and (why := why_no_ipv6()):
        pytest.skip(why)
    lines, taken = WorkerLines(TOKEN), queue.Queue[wire.WorkerReply]()
    address, replies = lines.listen(host)
    seats = [Seat("rank 0", StartedElsewhere())]
    try:
        with connected(zmq.DEALER, address) as stranger:
            for each in NONSENSE:
                stranger.send(each)
                lines.admit(seats, b"welcome", MILLISECONDS)
        assert not seats[0].identity
        with connected(zmq.DEALER, address) as worker:
            worker.send(wire.encode(wire.Join(worker=0, pid=1, host="h")))
            lines.admit(seats, b"welcome", MILLISECONDS)
            assert worker.recv() == b"welcome"
        thread = lines.receive(taken.put)
        with connected(zmq.PUSH, f"tcp://{with_port(host, replies)}") as worker:
            for each in NONSENSE:
                worker.send(each)
            worker.send(wire.encode(wire.WorkerReply(worker=0, number=7, reply=Done())))
            assert taken.get(timeout=WAIT_SECONDS).number == 7
        assert thread.is_alive()
        assert len([line for line in caplog.messages if line.startswith("ignored a message")]) == 2 * len(NONSENSE)
        lines.wake()
        thread.join(WAIT_SECONDS)
    finally:
        lines.close()


@pytest.mark.parametrize("nonsense", NONSENSE, ids=["empty", "unused byte", "no text", "deep"])
def test_a_worker_that_cannot_read_what_its_engine_says_tells_where_it_came_from(nonsense: bytes) -> None:
    with zmq.Context() as context, prepare(context.socket(zmq.ROUTER), TOKEN, listens=True) as engine:
        address = f"tcp://127.0.0.1:{engine.bind_to_random_port('tcp://127.0.0.1')}"
        line = EngineLine(wire.Invitation(address=address, token=TOKEN, worker=0))
        answering = threading.Thread(target=_answer, args=(engine, nonsense))
        answering.start()
        with pytest.raises(EngineError, match=rf"the engine at {address} sent what is no order"):
            line.join()
        answering.join(WAIT_SECONDS)
        line.flush()
        line._orders.disable_monitor()
        for each in (line._monitor, line._orders):  # a real one ends with its process
            each.close()
        line._orders.context.term()


def _answer(engine: zmq.Socket[bytes], word: bytes) -> None:
    """The first who says something hears this."""
    if engine.poll(MILLISECONDS):
        identity, _ = engine.recv_multipart()
        engine.send_multipart([identity, word])
