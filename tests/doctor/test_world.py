"""What the answer of a running server means: stuck, silent, starting, ended, and a server that does not answer."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import msgspec
import pytest

from moe_serve.base.errors import ConfigError
from moe_serve.base.world_messages import MemberStatus, WorldStatus
from moe_serve.doctor.finding import Finding
from moe_serve.doctor.world import Frontend, RankAtFrontend, WorldAnswered, WorldBody, ask_world, judge_world
from tests.support.http_server import make_state, serving
from tests.support.tokenizer_folders import write_folder


def rank(dp: int, **changes: object) -> MemberStatus:
    made = MemberStatus(
        role="engine",
        dp=dp,
        worker=-1,
        name=f"engine dp {dp} (pid 10{dp} on host-{dp})",
        host=f"host-{dp}",
        node="n",
        pid=100 + dp,
        state="ready",
        step=9,
        phase="layer 3 experts",
        seconds_in_phase=0.1,
        seconds_since_heard=0.4,
        unfinished=2,
    )
    return msgspec.structs.replace(made, **changes)


GOOD = WorldStatus(
    number=2,
    generation=0xABC,
    engines=2,
    ready=True,
    draining=False,
    ended="",
    missing=[],
    members=[rank(0), rank(1)],
    step_timeout_seconds=60,
)
FRONTEND = Frontend(7, "host-0", None, [RankAtFrontend(0, 9, 1, 1)])


def judged(frontend: Frontend = FRONTEND, reason: str = "", **changes: object) -> list[Finding]:
    world = None if reason else msgspec.structs.replace(GOOD, **changes)
    return judge_world(WorldAnswered("http://x", 0.01, 503 if reason else 200, WorldBody(world, reason, frontend)))


def bad(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(each.check, each.level) for each in findings if each.level != "ok"]


def test_a_world_that_is_well_has_nothing_to_mend() -> None:
    findings = judged()
    assert bad(findings) == []
    assert any("2 at dp 0, 2 at dp 1" in each.found for each in findings)


@pytest.mark.parametrize(("seconds", "limit", "level"), [(4, 60, "warning"), (11, 60, "failure"), (4, 6, "failure")])
def test_a_slow_step_names_whom_it_waits_for_where_and_since_when(seconds: float, limit: float, level: str) -> None:
    members = [rank(0, phase="layer 3 combine"), rank(1, seconds_in_phase=seconds)]
    findings = judged(members=members, slow_step=9, waits_for=[1], step_timeout_seconds=limit)
    assert bad(findings) == [("step", level)]
    (slow,) = [each for each in findings if each.check == "step"]
    assert f"engine dp 1 (pid 101 on host-1), in step 9, phase 'layer 3 experts', since {seconds}.0 s" in slow.found
    assert "dp 0" not in slow.found
    assert f"after {limit} s" in slow.means
    assert "101 on host-1" in slow.do


def test_a_silent_member_is_named_with_its_place() -> None:
    findings = judged(members=[rank(0), rank(1, state="silent", seconds_since_heard=3.4, seconds_in_phase=3.5)])
    assert bad(findings) == [("silent", "failure")]
    assert any("engine dp 1" in each.found and "3.4 s ago" in each.found for each in findings)


def test_a_world_that_starts_or_has_ended_is_told() -> None:
    assert bad(judged(ready=False, missing=["engine dp 1"])) == [("world", "warning")]
    assert bad(judged(ended="engine dp 1 died")) == [("world", "failure")]
    assert bad(judged(Frontend(7, "h", "the server is shutting down"))) == [("ready", "warning")]


def test_without_the_coordinator_what_the_server_last_heard_is_told() -> None:
    findings = judged(reason="the coordinator gave no answer in 3 s")
    assert bad(findings) == [("coordinator", "failure")]
    assert "dp 0 in step 9" in findings[-1].found


def test_a_server_that_has_no_world_or_wants_a_key_or_is_not_there_is_told(tmp_path: Path) -> None:
    state = make_state(write_folder(tmp_path), api_key="sesame")
    with serving(state) as url:
        assert "wants a key" in judge_world(ask_world(url, None))[0].found
        answered = ask_world(f"{url}/v1", "sesame")
        assert (answered.status, bad(judge_world(answered))) == (503, [("coordinator", "failure")])
        assert answered.body is not None
        assert "answered 404" in judge_world(ask_world(f"{url}/elsewhere", "sesame"))[0].found
    assert "did not answer" in judge_world(ask_world(url, None))[0].found


def test_a_server_that_is_stopped_is_waited_for_with_a_bound() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        begun = time.monotonic()
        answered = ask_world(f"127.0.0.1:{mute.getsockname()[1]}", None, seconds=0.3)
    assert time.monotonic() - begun < 3
    assert bad(judge_world(answered)) == [("server", "failure")]


@pytest.mark.parametrize("url", ["http://", "ftp://x", "http://x:port"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--server"):
        ask_world(url, None)
