"""A rank that stops or hangs inside a phase of a step: it is named, and those that only wait for it are not."""

from __future__ import annotations

import os
import re
import time
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from moe_serve.base.progress import Phase
from moe_serve.cli.random_model import make_model
from tests.support.load import Load
from tests.support.server import Server
from tests.support.trapped import ENVIRONMENT, HANG

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.long]

VICTIM = 1
STEP_SECONDS = 4
NAMED_SECONDS = STEP_SECONDS + 4.0
GONE_SECONDS = 5.0
OPTIONS = (
    *("-dp", "2", "-ep", "--max-model-len", "1024", "--kv-cache-memory-bytes", str(16 * 2**20)),
    *("--distributed-executor-backend", "tests.support.trapped:TrappedExecutor"),
    *("--step-timeout-seconds", str(STEP_SECONDS)),
)
PHASES = (Phase.ATTENTION, Phase.DISPATCH, Phase.EXPERTS, Phase.COMBINE, Phase.SAMPLE)
NAMED = rf"step \d+ has taken longer than step_timeout_seconds \({STEP_SECONDS} s\); it waits for: (.*)"


@dataclass(frozen=True)
class Blame:
    """Seconds until a verdict and until all were gone; the culprits it names; whether a stream is still open."""

    named_after: float
    gone_after: float
    culprits: str
    open_streams: int
    code: int | None
    log: str


@pytest.fixture(scope="module", params=["SIGSTOP", HANG])
def blames(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Phase, Blame]:
    """One server for each phase, all at the same time, since what takes long is the patience."""
    folder = tmp_path_factory.mktemp("trap")
    model = str(make_model(folder / "tiny"))
    with ExitStack() as stack:
        servers = {}
        for phase in PHASES:
            trap = f"{phase.name} {request.param} {VICTIM} {folder / phase.name}"
            servers[phase] = Server(model, *OPTIONS, environment=os.environ | {ENVIRONMENT: trap})
            stack.callback(servers[phase].end)
        loads = {phase: Load(server.wait_ready(), count=4).start() for phase, server in servers.items()}
        begun = time.monotonic()
        for phase in PHASES:
            (folder / phase.name).touch()
        return watch(servers, loads, begun)


def watch(servers: dict[Phase, Server], loads: dict[Phase, Load], begun: float) -> dict[Phase, Blame]:
    named: dict[Phase, tuple[float, str]] = {}
    gone: dict[Phase, float] = {}
    while len(gone) < len(servers) and time.monotonic() - begun < 2 * (NAMED_SECONDS + GONE_SECONDS):
        for phase, server in servers.items():
            found = None if phase in named else re.search(NAMED, server.log())
            if found is not None:
                named[phase] = time.monotonic() - begun, found.group(1)
            if phase not in gone and not server.family():
                gone[phase] = time.monotonic() - begun
            server.process.poll()
        time.sleep(0.05)
    blames = {}
    for phase, server in servers.items():
        after, culprits = named.get(phase, (999.0, ""))
        still_open = len(loads[phase].wait_ended(1))
        code, log = server.process.poll(), server.log()
        blames[phase] = Blame(after, gone.get(phase, 999.0), culprits, still_open, code, log)
    return blames


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_a_rank_that_stops_or_hangs_in_a_phase_is_named_and_everything_ends(
    blames: dict[Phase, Blame], phase: Phase
) -> None:
    blame = blames[phase]
    assert blame.named_after < NAMED_SECONDS, blame.log
    assert f"engine dp {VICTIM} (pid " in blame.culprits, blame.log
    assert blame.gone_after < NAMED_SECONDS + GONE_SECONDS, blame.log
    assert (blame.code, blame.open_streams) == (1, 0)
    assert "Traceback" not in blame.log


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_a_rank_that_only_waits_for_it_is_not_named(
    request: pytest.FixtureRequest, blames: dict[Phase, Blame], phase: Phase
) -> None:
    blame = blames[phase]
    if HANG in request.node.name and phase.waits_for_others:
        # Two that stand in the same exchange and both say they live look alike.
        assert blame.culprits.count("engine dp ") == 2
        assert blame.culprits.count(phase.value) == 2
    else:
        assert "engine dp 0 " not in blame.culprits, blame.log
