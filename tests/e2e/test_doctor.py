"""The doctor on real faults: ways between network namespaces, and a world that is stuck in several ways."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.pods import Pods, run, search_path, why_not
from moe_serve.base.secret import TOKEN_ENVIRONMENT
from moe_serve.cli.doctor import run_doctor
from moe_serve.cli.random_model import make_model
from tests.support.load import Load
from tests.support.server import Server
from tests.support.trapped import ENVIRONMENT, HANG

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]

Found = dict[str, list[dict[str, str]]]
DOCTOR = (sys.executable, "-m", "moe_serve", "doctor")
OTHER_PORT = 29551
VICTIM = 1


class Ways:
    """Pods "one" and "two"; in the second a doctor listens, with `token`."""

    def __init__(self, pods: Pods, folder: Path) -> None:
        self.pods = pods
        self.token = secrets.token_hex(16)
        self._log = folder / "listener.log"
        with self._log.open("wb") as log:
            self._listener = subprocess.Popen(
                self._inside("two", "--listen", "--seconds", "200"),
                env=self._environment(self.token),
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def check(self, *options: str, token: str | None = None) -> tuple[int, Found]:
        """Exit code and findings by check, as "one" finds the way to "two"."""
        done = subprocess.run(
            self._inside("one", "--peers", "two", "--json", *options),
            env=self._environment(self.token if token is None else token),
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.stdout, done.stderr
        found: Found = {}
        for each in json.loads(done.stdout)["findings"]:
            found.setdefault(each["check"], []).append(each)
        return done.returncode, found

    def wait_listening(self) -> None:
        deadline = time.monotonic() + 60
        while "listening at" not in self._log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def close(self) -> None:
        self._listener.kill()
        self._listener.wait()

    def _inside(self, name: str, *options: str) -> list[str]:
        return ["ip", "netns", "exec", self.pods.namespace(name), *DOCTOR, *options]

    def _environment(self, token: str) -> dict[str, str]:
        return {**os.environ, "PATH": search_path(), TOKEN_ENVIRONMENT: token}


@pytest.fixture
def ways(tmp_path: Path) -> Iterator[Ways]:
    if reason := why_not():
        pytest.skip(reason)
    pods = Pods(["one", "two"])
    try:
        made = Ways(pods, tmp_path)
        try:
            made.wait_listening()
            yield made
        finally:
            made.close()
    finally:
        pods.close()


def bad(found: Found) -> set[str]:
    return {check for check, each in found.items() if any(one["level"] != "ok" for one in each)}


def test_a_good_way_is_good_and_another_token_is_not(ways: Ways) -> None:
    code, found = ways.check("--ports", str(OTHER_PORT))
    assert (code, bad(found)) == (0, set())
    assert sum(f"port {OTHER_PORT}: open" in each["found"] for each in found["ports here"] + found["ports there"]) == 2
    code, found = ways.check(token=secrets.token_hex(16))
    assert (code, bad(found)) == (1, {"token"})
    assert "versions" not in found


def test_a_firewall_that_lets_one_port_through_is_found_though_all_else_is_well(ways: Ways) -> None:
    """What is not to be let through has no route; rules of routes are asked before the own addresses are."""
    two = ways.pods.namespace("two")
    for order in ("add pref 100 lookup local", "add pref 10 iif eth0 ipproto tcp dport 29551-65534 blackhole"):
        run("ip", "-n", two, "rule", *order.split())
    run("ip", "-n", two, "rule", "del", "pref", "0")
    begun = time.monotonic()
    code, found = ways.check()
    assert time.monotonic() - begun < 30
    assert code == 1
    assert bad(found) == {"ports there", "ports here"}
    assert found["ports there"][0]["found"].count("no answer") == 3
    assert "every port of a world" in found["ports there"][0]["means"]


def test_a_device_on_the_way_that_drops_full_packets_without_a_word_is_found(ways: Ways) -> None:
    ways.pods.set_mtu("two", 1200)
    code, found = ways.check()
    assert (code, bad(found)) == (1, {"packet size (MTU)"})
    (packets,) = found["packet size (MTU)"]
    assert "0 of 262144 bytes written here arrived" in packets["found"]
    assert "packets of 1500 here and 1500 there" in packets["found"]


def test_machines_whose_devices_differ_are_warned_of(ways: Ways) -> None:
    run("ip", "-n", ways.pods.namespace("two"), "link", "set", "eth0", "mtu", "1300")
    code, found = ways.check()
    assert (code, bad(found)) == (0, {"packet size (MTU)"})
    assert "packets of 1500 here and 1300 there" in found["packet size (MTU)"][0]["found"]


def test_a_cable_that_is_out_and_a_route_that_leads_nowhere_are_told_apart(ways: Ways) -> None:
    ways.pods.set_link("two", up=False)
    code, found = ways.check()
    assert (code, set(found)) == (1, {"name", "port"})
    assert "no answer" in found["port"][0]["found"] or "no route" in found["port"][0]["found"]
    ways.pods.set_link("two", up=True)
    run("ip", "-n", ways.pods.namespace("one"), "route", "add", "blackhole", f"{ways.pods.addresses['two']}/32")
    code, found = ways.check()
    assert (code, set(found)) == (1, {"name", "port"})
    assert "knows no way there" in found["port"][0]["means"]


class Stuck:
    """A server whose rank 1 hangs in its experts once `arm()` was called."""

    def __init__(self, server: Server, trap: Path) -> None:
        self.server, self._trap = server, trap

    def arm(self) -> None:
        self._trap.touch()

    def pid(self) -> int:
        return self.server.member("engine.process", dp=VICTIM).pid

    def look(self, capsys: pytest.CaptureFixture[str]) -> tuple[int, Found, dict[str, Any]]:
        capsys.readouterr()
        code = run_doctor(["--server", self.server.base_url, "--json"])
        told = json.loads(capsys.readouterr().out)
        found: Found = {}
        for each in told["findings"]:
            found.setdefault(each["check"], []).append(each)
        return code, found, told["facts"]


@pytest.fixture(scope="module")
def stuck() -> Iterator[Stuck]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trap = folder / "armed"
        options = ("-dp", "2", "-ep", "--max-model-len", "1024", "--kv-cache-memory-bytes", str(16 * 2**20))
        executor = ("--distributed-executor-backend", "tests.support.trapped:TrappedExecutor")
        told = os.environ | {ENVIRONMENT: f"EXPERTS {HANG} {VICTIM} {trap}"}
        model = str(make_model(folder / "tiny"))
        server = Server(model, *options, *executor, "--step-timeout-seconds", "60", environment=told)
        try:
            yield Stuck(server.wait_ready(), trap)
        finally:
            for process in server.family():  # a rank that hangs ends for nothing else
                process.kill()
            server.end()


def test_a_world_that_is_well_is_told_with_everybody_in_it(stuck: Stuck, capsys: pytest.CaptureFixture[str]) -> None:
    time.sleep(2)  # for a beat since the world was ready
    code, found, facts = stuck.look(capsys)
    assert (code, bad(found)) == (0, set())
    world = facts["world"]
    assert [(each["role"], each["dp"]) for each in world["members"]] == [("engine", 0), ("engine", 1), ("api", -1)]
    pids = {process.pid for process in stuck.server.family()}
    assert {each["pid"] for each in world["members"]} <= pids
    assert world["members"][VICTIM]["phase"] == "asleep"
    assert run_doctor(["--server", stuck.server.base_url]) == 0
    shown = capsys.readouterr().out
    assert "engine dp 1 (pid" in shown
    assert "asleep" in shown


def test_a_coordinator_that_is_stopped_is_told_and_the_server_says_what_it_knows(
    stuck: Stuck, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = psutil.Process(stuck.server.process.pid)
    launcher.send_signal(signal.SIGSTOP)
    try:
        begun = time.monotonic()
        code, found, facts = stuck.look(capsys)
        took = time.monotonic() - begun
    finally:
        launcher.send_signal(signal.SIGCONT)
    assert took < 5
    assert code == 1
    assert "coordinator" in bad(found)
    assert facts["world"] is None
    assert [each["dp"] for each in facts["frontend"]["ranks"]] == [0, 1]


def test_a_rank_that_is_stopped_is_named_before_the_world_gives_it_up(
    stuck: Stuck, capsys: pytest.CaptureFixture[str]
) -> None:
    time.sleep(2)  # for beats after the test before
    engine = stuck.server.member("engine.process", dp=VICTIM)
    engine.send_signal(signal.SIGSTOP)
    try:
        time.sleep(3.5)
        code, found, facts = stuck.look(capsys)
    finally:
        engine.send_signal(signal.SIGCONT)
    assert code == 1
    assert f"engine dp {VICTIM} (pid {engine.pid} " in found["silent"][0]["found"]
    assert len(found["silent"]) == 1
    assert 1.8 < facts["world"]["members"][VICTIM]["seconds_since_heard"] < 7
    time.sleep(2)
    assert stuck.look(capsys)[0] == 0


def test_a_rank_that_hangs_in_a_phase_is_named_with_it_long_before_the_step_timeout(
    stuck: Stuck, capsys: pytest.CaptureFixture[str]
) -> None:
    load = Load(stuck.server, count=4).start()
    pid = stuck.pid()
    stuck.arm()
    begun = time.monotonic()
    while True:
        code, found, facts = stuck.look(capsys)
        if "step" in bad(found):
            break
        assert time.monotonic() - begun < 15
        time.sleep(0.2)
    assert code == 0, "so soon it may still be a long step"
    assert found["step"][0]["level"] == "warning"
    told = found["step"][0]["found"]
    assert f"engine dp {VICTIM} (pid {pid} " in told
    assert "experts', since" in told
    assert "engine dp 0" not in told
    counts = [each["unfinished"] for each in facts["world"]["members"][:2]]
    assert sum(counts) == 4
    while code == 0:
        assert time.monotonic() - begun < 25
        time.sleep(0.5)
        code, found, _ = stuck.look(capsys)
    assert found["step"][0]["level"] == "failure"
    assert stuck.server.process.poll() is None
    assert all(stream.ended is None for stream in load.streams)
