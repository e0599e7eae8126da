"""Who is named when several workers of an engine go down together."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from moe_serve.base.errors import ConfigError, EngineError, WorkerDied
from moe_serve.executor.seats import Seat, name_missing
from moe_serve.executor.starting import StartedElsewhere
from moe_serve.executor.subprocesses import WorkerChild
from moe_serve.executor.watching import Watch

WAIT = 10.0


class Engine:
    """Seats 0 to 2 of somebody else's workers, and seat 3 of a child of ours. Connections close as the test says."""

    def __init__(self) -> None:
        self.child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        elsewhere = [Seat(f"{worker}", StartedElsewhere()) for worker in range(3)]
        self.seats = [*elsewhere, Seat("3", WorkerChild(self.child))]
        self.closed: queue.Queue[Seat] = queue.Queue()
        self.deaths: list[WorkerDied] = []
        self.told = threading.Event()
        self.watch = Watch(self.seats, await_closed=self.await_closed, died=self.died)
        self.thread = self.watch.start()

    def await_closed(self, seconds: float) -> list[Seat]:
        try:
            return [self.closed.get(timeout=seconds)]
        except queue.Empty:
            return []

    def died(self, death: WorkerDied) -> None:
        self.deaths.append(death)
        self.told.set()

    def close(self) -> None:
        self.watch.stop()
        self.thread.join(WAIT)
        self.child.kill()
        self.child.communicate()


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


def test_the_first_to_close_is_named(engine: Engine) -> None:
    engine.closed.put(engine.seats[2])
    engine.closed.put(engine.seats[0])
    assert engine.told.wait(WAIT)
    assert "worker 2, started by somebody else closed its connection" in str(engine.deaths[0])


def test_a_killed_child_is_named_before_those_that_closed_earlier(engine: Engine) -> None:
    engine.closed.put(engine.seats[0])
    engine.child.kill()
    assert engine.told.wait(WAIT)
    assert "worker 3" in str(engine.deaths[0])
    assert "SIGKILL" in str(engine.deaths[0])


def test_a_child_that_ends_of_itself_is_named_with_its_exit_code(engine: Engine) -> None:
    engine.child.communicate(b"\n")
    assert engine.told.wait(WAIT)
    assert "worker 3" in str(engine.deaths[0])
    assert "exit code 0" in str(engine.deaths[0])


def test_a_worker_that_failed_in_an_exchange_blames_the_one_that_is_gone(engine: Engine) -> None:
    engine.closed.put(engine.seats[1])
    engine.closed.put(engine.seats[0])
    engine.closed.put(engine.seats[2])
    error = engine.watch.cause(engine.seats[0], EngineError("connection reset by peer"))
    assert isinstance(error, WorkerDied)
    assert "worker 1," in str(error)
    assert "worker 1," in str(engine.deaths[0])


@pytest.mark.parametrize("kind", [EngineError, ConfigError])
def test_a_worker_that_failed_alone_is_to_blame_itself(engine: Engine, kind: type[EngineError | ConfigError]) -> None:
    own = kind("nonsense")
    assert engine.watch.cause(engine.seats[0], own) is own
    assert not engine.deaths


def test_who_is_missing_is_named_and_of_several_the_one_that_is_stopped(engine: Engine) -> None:
    engine.child.send_signal(signal.SIGSTOP)
    while not engine.seats[3].started.is_stopped():
        pass
    assert name_missing(engine.seats, {0}) == f"worker 3, pid {engine.child.pid} on this machine (stopped)"
    assert name_missing(engine.seats, {0, 2, 3}) == "worker 1, started by somebody else"


class Actor:
    """Of somebody who learns late that a worker ended, and never whether it was killed."""

    knows_signals = False

    def __init__(self, learns_after: float) -> None:
        self.who = "an actor"
        self._known_at = time.monotonic() + learns_after

    def poll(self) -> int | None:
        return None if time.monotonic() < self._known_at else -signal.SIGKILL

    def fate(self) -> str:
        return "was killed or crashed"

    def kill(self) -> None:
        pass

    def is_stopped(self) -> bool:
        return False


def test_where_kills_and_crashes_look_the_same_the_first_to_close_is_named_with_its_fate(engine: Engine) -> None:
    engine.seats[0].started, engine.seats[1].started = Actor(0.2), Actor(1.5)
    engine.closed.put(engine.seats[1])
    engine.closed.put(engine.seats[0])
    assert engine.told.wait(WAIT)
    assert "worker 1, an actor was killed or crashed" in str(engine.deaths[0])
    error = engine.watch.cause(engine.seats[0], EngineError("connection reset by peer"))
    assert "worker 1, an actor was killed or crashed" in str(error)
