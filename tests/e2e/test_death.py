"""Whoever dies or stops, under load: every stream ends with an error, the dead one is named, nothing stays behind."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from moe_serve.cli.random_model import make_model
from tests.support.load import Load, Probe
from tests.support.server import Server, serving

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

SMALL = ("--max-model-len", "1024", "--kv-cache-memory-bytes", str(16 * 2**20))
SHARED_MEMORY = Path("/dev/shm")
LASTING = ("--max-model-len", "4096", "--kv-cache-memory-bytes", str(16 * 2**20))
LASTING_TOKENS = 4000
"""Of each of two requests: some four times as many as a fast machine makes within a --shutdown-timeout of 2 s."""
GONE_SECONDS = 5.0
NAMED_SECONDS = 10.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(autouse=True)
def no_shared_memory_stays() -> Iterator[None]:
    before = set(SHARED_MEMORY.iterdir())
    yield
    left = [file for file in set(SHARED_MEMORY.iterdir()) - before if not is_in_use(file)]
    assert not left


def is_in_use(file: Path) -> bool:
    """Whether a living process (of anybody's) has mapped the file: then it is no remainder of ours."""
    for process in psutil.process_iter():
        try:
            if str(file) in Path(f"/proc/{process.pid}/maps").read_text():
                return True
        except OSError:
            continue
    return False


# --- killed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "module", "place", "name"),
    [
        (("-dp", "2"), "engine.process", {"dp": 1}, "engine dp 1"),
        pytest.param(
            *(("-tp", "2"), "worker.process", {"dp": 0, "worker": 0}, "worker dp 0 tp 0"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *(("-dp", "2", "-tp", "2"), "worker.process", {"dp": 1, "worker": 1}, "worker dp 1 tp 1"),
            marks=pytest.mark.long,
        ),
    ],
    ids=["engine-dp2", "worker-tp2", "worker-dp2-tp2"],
)
def test_a_killed_rank_ends_every_stream_with_an_error_and_the_server_names_it(
    model: str, sizes: tuple[str, ...], module: str, place: dict[str, int], name: str
) -> None:
    with serving(model, *sizes, "--enable-expert-parallel", *SMALL) as server:
        load, probe = Load(server).start(), Probe(server)
        died = time.monotonic()
        victim = server.member(module, **place)
        victim.kill()
        assert not load.wait_ended(GONE_SECONDS)
        left = server.wait_gone(died + GONE_SECONDS - time.monotonic())
        assert not left, [process.cmdline() for process in left]
        assert server.process.wait(1) == 1
        for stream in load.streams:
            assert stream.error is not None, server.log()
            assert f"{name} (pid {victim.pid} " in stream.error["message"]
            assert not stream.broken
        assert 503 in probe.stop()
        assert f"{name} (pid {victim.pid} " in last_word(server)
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("victim", ["API server", pytest.param("launcher", marks=pytest.mark.long)])
def test_nothing_outlives_a_killed_api_server_or_launcher(model: str, victim: str) -> None:
    with serving(model, "-dp", "2", "--enable-expert-parallel", *SMALL) as server:
        load = Load(server).start()
        died = time.monotonic()
        (server.member("api.server") if victim == "API server" else server.process).kill()
        assert not load.wait_ended(GONE_SECONDS)
        left = server.wait_gone(died + GONE_SECONDS - time.monotonic())
        assert not left, [process.cmdline() for process in left]
        assert all(stream.broken or stream.error for stream in load.streams)
        if victim == "API server":
            assert server.process.wait(1) == 1
            assert "API server" in last_word(server)
        assert "Traceback" not in server.log()


# --- stopped -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stop:
    """Who is sent SIGSTOP in a server with these options, and what must then be said."""

    options: tuple[str, ...]
    find: Callable[[Server], int]
    named: str


STOPS = {
    "engine": Stop(
        ("-dp", "2"),
        lambda server: server.member("engine.process", dp=1).pid,
        r"engine dp 1 \(pid PID .* not been heard for \d+ s .* last seen in step \d+, phase '.+'",
    ),
    "worker in a step": Stop(
        ("-tp", "2", "--step-timeout-seconds", "4"),
        lambda server: server.member("worker.process", dp=0, worker=1).pid,
        r"step \d+ has taken longer than step_timeout_seconds \(4 s\); "
        r"it waits for: worker dp 0 tp 1 \(pid PID .* in step \d+, phase '.+', since \d+ s",
    ),
    "API server": Stop(
        (), lambda server: server.member("api.server").pid, r"API server \(pid PID .* not been heard for \d+ s"
    ),
    "launcher": Stop((), lambda server: server.process.pid, r"the coordinator at .* was silent for 8 s"),
}


@dataclass(frozen=True)
class Stopped:
    """What became of it: seconds until it was named, and until the others were gone; who was left then."""

    named_after: float
    gone_after: float
    left: list[int]
    victim: int
    streams_open: int
    code: int
    log: str


@pytest.fixture(scope="module")
def stopped(model: str) -> dict[str, Stopped]:
    """One server per victim, all stopped at the same time, since what takes long is the silence."""
    with ExitStack() as stack:
        servers = {
            name: Server(model, "--enable-expert-parallel", *stop.options, *SMALL) for name, stop in STOPS.items()
        }
        for server in servers.values():
            stack.callback(server.end)
        loads = {name: Load(server.wait_ready(), count=2).start() for name, server in servers.items()}
        victims = {name: stop.find(servers[name]) for name, stop in STOPS.items()}
        begun = time.monotonic()
        for victim in victims.values():
            os.kill(victim, signal.SIGSTOP)
        named: dict[str, float] = {}
        gone: dict[str, float] = {}
        while len(gone) < len(STOPS) and time.monotonic() - begun < 2 * NAMED_SECONDS:
            for name, server in servers.items():
                if name not in named and re.search(pattern(name, victims), server.log()):
                    named[name] = time.monotonic() - begun
                if name not in gone and {process.pid for process in server.family()} <= keeps(name, server):
                    gone[name] = time.monotonic() - begun
            time.sleep(0.05)
        left = {name: [process.pid for process in server.family()] for name, server in servers.items()}
        servers["launcher"].process.send_signal(signal.SIGCONT)
        return {
            name: Stopped(
                named_after=named.get(name, 999.0),
                gone_after=gone.get(name, 999.0),
                left=left[name],
                victim=victims[name],
                streams_open=len(loads[name].wait_ended(1)),
                code=server.process.wait(10),
                log=server.log(),
            )
            for name, server in servers.items()
        }


def pattern(name: str, victims: dict[str, int]) -> str:
    return STOPS[name].named.replace("PID", str(victims[name]))


def keeps(name: str, server: Server) -> set[int]:
    """Who may stay: a stopped launcher can neither be ended by its children nor end itself."""
    return {server.process.pid} if name == "launcher" else set()


@pytest.mark.long
@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_process_is_named_within_ten_seconds_and_all_ends(stopped: dict[str, Stopped], name: str) -> None:
    fate = stopped[name]
    assert fate.named_after < NAMED_SECONDS, fate.log
    assert fate.gone_after < NAMED_SECONDS + GONE_SECONDS, fate.log
    assert fate.left == ([fate.victim] if name == "launcher" else [])
    assert fate.streams_open == 0
    assert fate.code == 1
    assert "Traceback" not in fate.log


@pytest.mark.long
def test_a_launcher_that_was_stopped_blames_nobody_else(stopped: dict[str, Stopped]) -> None:
    log = stopped["launcher"].log
    assert re.search(r"\[launcher\] the coordinator itself was stopped for \d+ s", log), log


# --- asked to end --------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_sigterm_lets_answers_finish_and_refuses_new_ones(model: str) -> None:
    with serving(model, "-dp", "2", "--enable-expert-parallel", *SMALL, "--shutdown-timeout", "60") as server:
        load = Load(server, count=4, max_tokens=600).start()
        server.process.terminate()
        refused = until_draining(server)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "unavailable"
        assert server.get("/readyz").status_code == 503
        assert server.get("/livez").status_code == server.get("/health").status_code == 200
        assert not load.wait_ended(60)
        assert [stream.finish_reason for stream in load.streams] == ["length"] * 4
        assert [stream.error for stream in load.streams] == [None] * 4
        assert server.process.wait(GONE_SECONDS) == 0
        assert not server.wait_gone(0)
        assert "Traceback" not in server.log()


def until_draining(server: Server) -> httpx.Response:
    """The answer to a new request once the server has heard the signal."""
    deadline = time.monotonic() + 5
    while server.get("/readyz").status_code == 200 and time.monotonic() < deadline:
        time.sleep(0.01)
    return httpx.post(server.base_url + "/v1/completions", json={"prompt": "late", "max_tokens": 1})


@pytest.mark.long
def test_answers_that_outlast_the_shutdown_timeout_end_with_an_error_event(model: str) -> None:
    with serving(model, *LASTING, "--shutdown-timeout", "1") as server:
        load = Load(server, count=2, max_tokens=LASTING_TOKENS).start()
        asked = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - asked < 1 + GONE_SECONDS
        assert not load.wait_ended(1)
        for stream in load.streams:
            assert stream.error is not None
            assert "shutting down" in stream.error["message"]
        assert not server.wait_gone(0)
        left = r"not finished within --shutdown-timeout \(1 s\): engine dp 0: 2 requests \(cmpl-\S+, cmpl-\S+\)$"
        assert re.search(left, server.log(), re.MULTILINE), server.log()


@pytest.mark.long
def test_a_drain_that_the_api_server_does_not_hear_of_ends_at_its_deadline(model: str) -> None:
    with serving(model, *LASTING, "--shutdown-timeout", "2") as server:
        load = Load(server, count=2, max_tokens=LASTING_TOKENS).start()
        server.member("api.server").suspend()
        asked = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - asked < 2 + GONE_SECONDS
        assert re.search(r"\(2 s\): engine dp 0: \d requests? \(cmpl-", server.log()), server.log()
        assert not server.wait_gone(0)
        assert not load.wait_ended(1)


@pytest.mark.long
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(model: str, second: signal.Signals) -> None:
    with serving(model, *SMALL, "--shutdown-timeout", "600") as server:
        load = Load(server, count=2).start()
        server.process.send_signal(signal.SIGTERM)
        until_draining(server)
        server.process.send_signal(second)
        assert server.process.wait(2) == 128 + second
        assert not server.wait_gone(1)
        assert not load.wait_ended(1)
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("how", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_a_server_that_is_ended_while_starting_leaves_nothing(model: str, how: signal.Signals) -> None:
    server = Server(model, "-tp", "2", *SMALL)
    try:
        wait_for_a_worker(server)
        server.process.send_signal(how)
        assert server.process.wait(GONE_SECONDS) == (0 if how == signal.SIGTERM else -how)
        left = server.wait_gone(0 if how == signal.SIGTERM else 2 * GONE_SECONDS)
        assert not left, [process.cmdline() for process in left]
        assert "Traceback" not in server.log()
    finally:
        server.end()


def wait_for_a_worker(server: Server) -> None:
    """Until the engine has started one, which has not joined yet."""
    deadline = time.monotonic() + 60
    while not any("moe_serve.worker.process" in process.cmdline() for process in server.family()):
        assert time.monotonic() < deadline, server.log()
        time.sleep(0.01)


def last_word(server: Server) -> str:
    """The launcher's last line."""
    return [line for line in server.log().splitlines() if "[launcher]" in line][-1]
