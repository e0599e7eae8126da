"""A rank killed or stopped in each phase of a rearrangement: it is named, all ends, nothing is half-applied."""

from __future__ import annotations

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from moe_serve.cli.random_model import make_model
from tests.support.dying import ENVIRONMENT
from tests.support.load import Load
from tests.support.server import Server

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]

VICTIM = 1
NAMED_SECONDS = 10.0
AT_ONCE = 2
"""Worlds side by side; with more on two cores the seconds would be those of waiting for a core."""
GONE_SECONDS = 5.0
EPLB = {
    "window_size": 20,
    "step_interval": 1_000_000,
    "policy": "static",
    "num_redundant_experts": 4,
    "max_bytes_per_step": 1 << 19,
}
OPTIONS = (
    *("-dp", "2", "-ep", "--enable-eplb", "--eplb-config", json.dumps(EPLB)),
    *("--distributed-executor-backend", "tests.support.dying:DyingExecutor"),
    *("--max-model-len", "1024", "--kv-cache-memory-bytes", str(16 * 2**20)),
)
PHASES = ("asked", "moving", "staged", "committing", "committed")


@dataclass(frozen=True)
class Fate:
    """Seconds from the rearrangement's begin until the victim was named, and until all were gone; what was seen."""

    named_after: float
    gone_after: float
    left: list[list[str]]
    open_streams: int
    errors: list[str]
    finished: int
    code: int | None
    log: str


def fate_of(server: Server, victim: int, how: str, load: Load, begun: float) -> Fate:
    words = (
        rf"engine dp {VICTIM} \(pid {victim} .*died; last seen in step"
        if how == "SIGKILL"
        else rf"engine dp {VICTIM} \(pid {victim} .*not been heard for \d+ s"
    )
    named = gone = 999.0
    while time.monotonic() - begun < NAMED_SECONDS + GONE_SECONDS + 5 and gone == 999.0:
        if named == 999.0 and re.search(words, server.log()):
            named = time.monotonic() - begun
        if not server.family():
            gone = time.monotonic() - begun
        server.process.poll()
        time.sleep(0.05)
    open_streams = len(load.wait_ended(1))
    return Fate(
        named_after=named,
        gone_after=gone,
        left=[process.cmdline() for process in server.family()],
        open_streams=open_streams,
        errors=[stream.error["message"] if stream.error else "" for stream in load.streams],
        finished=sum(stream.finish_reason is not None for stream in load.streams),
        code=server.process.poll(),
        log=server.log(),
    )


def die(model: str, how: str, phases: tuple[str, ...]) -> dict[str, Fate]:
    """One server for each phase, all at the same time, since what takes long is the silence."""
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for phase in phases:
            environment = os.environ | {ENVIRONMENT: f"{phase} {how} {VICTIM}"}
            servers[phase] = Server(model, *OPTIONS, environment=environment)
            stack.callback(servers[phase].end)

        def watch(phase: str) -> Fate:
            server = servers[phase]
            victim = server.member("engine.process", dp=VICTIM).pid
            load = Load(server, count=2).start()
            begun = time.monotonic()
            asked = server.post("/eplb/apply", {"policy": "shuffle"})
            assert asked.status_code == 202, asked.text
            return fate_of(server, victim, how, load, begun)

        for server in servers.values():
            server.wait_ready()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return dict(zip(phases, pool.map(watch, phases), strict=True))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module", params=["SIGKILL", "SIGSTOP"])
def fates(request: pytest.FixtureRequest, model: str) -> dict[str, Fate]:
    return die(model, request.param, PHASES)


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_lost_in_a_rearrangement_is_named_and_everything_ends(fates: dict[str, Fate], phase: str) -> None:
    fate = fates[phase]
    assert fate.named_after < NAMED_SECONDS, fate.log
    assert fate.gone_after < NAMED_SECONDS + GONE_SECONDS, fate.log
    assert not fate.left
    assert fate.code == 1, fate.log
    assert (fate.open_streams, fate.finished) == (0, 0)
    assert all(f"engine dp {VICTIM} " in error for error in fate.errors), fate.errors
    assert "Traceback" not in fate.log


@pytest.mark.parametrize("phase", PHASES)
def test_nobody_serves_a_placement_that_not_all_ranks_have(fates: dict[str, Fate], phase: str) -> None:
    """The rearrangement is never reported as done: its last word would be the launcher's log line."""
    assert "rearrangement (request) done" not in fates[phase].log
