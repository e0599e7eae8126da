"""What a member is told, and how its processes are found again by it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from moe_serve.base.config import Config
from moe_serve.base.site import Site
from moe_serve.world.member import ENVIRONMENT, MemberSpec, end_all, started, threads_per_rank

UNREADABLE = ["nothing that can be read", '{"host": "\udcff\udcfe"}', '{"x": ' + "[" * 100_000]
"""No JSON; no UTF-8 (a byte that is no text is such a surrogate in Python's environment); nested too deep."""
Start = Callable[[dict[str, str]], subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts sleeping processes with an environment, and ends them."""
    started = []

    def run(environment: dict[str, str]) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def spec(token: str, dp: int = 0) -> MemberSpec:
    config = Config.from_flat({"api_key": "sesame", "data_parallel_size": 2})
    return MemberSpec(host="127.0.0.1", port=7, token=token, config=config.to_json(), dp=dp, site=Site(threads=3))


def test_a_spec_arrives_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = spec("token")
    environment = sent.to_environment()
    monkeypatch.setenv(ENVIRONMENT, environment[ENVIRONMENT])
    arrived = MemberSpec.from_environment()
    assert arrived == sent
    assert arrived.load_config().parallel.data_parallel_size == 2
    assert environment["OMP_NUM_THREADS"] == "3"


def of(token: str) -> list[int]:
    return started(lambda told: told.token == token)


def test_processes_of_a_world_are_found_by_its_whole_token_and_members_by_all_they_were_told(start: Start) -> None:
    first, second = spec("token-of-one", 0), spec("token-of-one", 1)
    members = [start(first.to_environment()), start(second.to_environment())]
    start(spec("token-of-another").to_environment())
    start(spec("token-of-one-more").to_environment())
    for unreadable in UNREADABLE:
        start({**os.environ, "SOME_OTHER_VARIABLE": "token-of-one", ENVIRONMENT: unreadable})
    wait_until(lambda: len(of("token-of-one")) >= 2 and len(of("token-of-one-more")) == 1)
    assert sorted(of("token-of-one")) == sorted(member.pid for member in members)
    assert started(lambda told: told == second) == [members[1].pid]
    assert of("token-of") == of("dev") == []


def test_this_process_is_never_among_them() -> None:
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            "from moe_serve.world.member import started; print(started(lambda told: told.token == 'token-of-mine'))",
        ],
        env=spec("token-of-mine").to_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ended.stdout == "[]\n"


def test_ending_all_ends_them_and_does_not_mind_who_is_gone(start: Start) -> None:
    process = start(dict(os.environ))
    end_all([process.pid])
    assert process.wait(5) == -9
    end_all([process.pid])


def test_ranks_share_the_cores_and_each_has_one() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_rank(1) == cores
    assert threads_per_rank(cores) == 1
    assert threads_per_rank(10 * cores) == 1


def wait_until(true: Callable[[], bool]) -> None:
    """A child has its parent's environment until it runs its own program."""
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
