"""The coordinator's state machine: who belongs, when the world is ready, who is blamed when it ends."""

from __future__ import annotations

import math
import re

import msgspec
import pytest

from moe_serve.base.balance_messages import StageReport, StepLoad
from moe_serve.base.commands import StageExperts
from moe_serve.base.config import Config
from moe_serve.base.messages import (
    Ack,
    Drain,
    Failure,
    ForFleet,
    FrontendAt,
    Heartbeat,
    Hello,
    Leaving,
    LineTo,
    Ready,
    Refused,
    Retire,
    Stop,
    StoreAt,
    Unfinished,
    Wake,
    Welcome,
    WorldReady,
    WorldView,
)
from moe_serve.base.progress import Phase
from moe_serve.base.topology import Topology
from moe_serve.world.fleet import Fleet
from moe_serve.world.parcels import Send
from tests.support.balancing import Balanced, opened, skewed, solved

AGREEMENT = Config().agreement()


def make_fleet(*, dp: int = 2, pp: int = 1, tp: int = 1, step_timeout: float = 60) -> Fleet:
    return Fleet(
        topology=Topology(dp=dp, pp=pp, tp=tp),
        agreement=AGREEMENT,
        has_workers=pp * tp > 1,
        step_timeout_seconds=step_timeout,
    )


def engine(dp: int, **changes: object) -> Hello:
    values: dict[str, object] = {"role": "engine", "dp": dp, "pid": 100 + dp, "host": "here"}
    return Hello(**(values | {"agreement": AGREEMENT} | changes))  # type: ignore[arg-type]


def worker(index: int) -> Hello:
    return Hello(role="worker", dp=0, worker=index, pid=200 + index, host="here")


API = Hello(role="api", pid=99, host="here", address="tcp://here:1", agreement=AGREEMENT)


def formed(fleet: Fleet, now: float = 0.0) -> Fleet:
    """Engines are members 0.., the API server is member 9."""
    for dp in range(fleet.topology.dp):
        fleet.hear(dp, engine(dp), now)
    fleet.hear(9, API, now)
    for member in (*range(fleet.topology.dp), 9):
        fleet.hear(member, Ready(), now)
    assert fleet.ready
    return fleet


def beat(
    fleet: Fleet, member: int, now: float, *, step: int = 1, phase: Phase = Phase.ASLEEP, seconds: float = 0
) -> None:
    fleet.hear(member, Heartbeat(step=step, phase=phase, seconds=seconds, layer=2), now)


def answers(sends: list[Send], member: int) -> list[object]:
    return [send.message for send in sends if send.member == member]


def test_a_member_is_welcome_and_its_beats_are_acknowledged() -> None:
    fleet = make_fleet()
    assert answers(fleet.hear(0, engine(0), 0), 0) == [Welcome(WorldView(engines=2))]
    assert answers(fleet.hear(0, Heartbeat(step=0, phase=Phase.STARTING, seconds=0), 1), 0) == [Ack()]


def test_who_says_no_hello_is_refused_and_disturbs_nobody() -> None:
    fleet = formed(make_fleet())
    for message in (Heartbeat(step=1, phase=Phase.STARTING, seconds=0), Wake(1), Ready()):
        sends = fleet.hear(77, message, 1)
        assert [type(send.message) for send in sends] == [Refused]
        assert sends[0].close
    assert fleet.lost(77, 1) == []
    assert fleet.ended is None


def test_a_second_process_for_a_place_is_refused() -> None:
    fleet = formed(make_fleet())
    assert isinstance(fleet.hear(50, engine(1), 1)[0].message, Refused)
    assert isinstance(fleet.hear(51, engine(7), 1)[0].message, Refused)
    assert fleet.ended is None


def test_other_options_end_a_forming_world_and_name_rank_and_field() -> None:
    fleet = make_fleet()
    fleet.hear(0, engine(0), 0)
    other = Config.from_flat({"block_size": 32}).agreement()
    sends = fleet.hear(1, engine(1, agreement=other), 0)
    assert isinstance(sends[0].message, Refused)
    assert fleet.ended is not None
    assert fleet.ended.code == 2
    assert "engine dp 1" in fleet.ended.reason
    assert "block_size: 32, not 16" in fleet.ended.reason


def test_other_options_of_a_late_stranger_do_not_end_a_ready_world() -> None:
    fleet = formed(make_fleet())
    sends = fleet.hear(60, Hello(role="api", pid=1, host="x", agreement={"block_size": "1"}), 1)
    assert isinstance(sends[0].message, Refused)
    assert fleet.ended is None


def test_engines_hear_of_the_store_and_of_front_ends_whenever_they_come() -> None:
    fleet = make_fleet()
    fleet.hear(0, engine(0), 0)
    fleet.hear(0, StoreAt("host", 5), 0)
    assert StoreAt("host", 5) in answers(fleet.hear(1, engine(1), 0), 1)
    sends = fleet.hear(9, API, 0)
    for member in (0, 1):
        assert answers(sends, member) == [WorldView(engines=2, frontends=[FrontendAt("tcp://here:1")])]


def test_the_world_is_ready_when_the_last_member_is() -> None:
    fleet = make_fleet()
    assert fleet.missing() == ["engine dp 0", "engine dp 1", "API server"]
    fleet.hear(0, engine(0), 0)
    fleet.hear(9, API, 0)
    fleet.hear(0, Ready(), 0)
    assert fleet.hear(9, Ready(), 0) == []
    fleet.hear(1, engine(1), 0)
    sends = fleet.hear(1, Ready(), 0)
    assert sorted(send.member for send in sends if send.message == WorldReady()) == [0, 1, 9]


def test_workers_are_expected_where_engines_have_them() -> None:
    fleet = make_fleet(dp=1, tp=2)
    assert fleet.missing() == ["engine dp 0", "worker dp 0 tp 0", "worker dp 0 tp 1", "API server"]


def test_workers_of_a_pipeline_are_told_by_stage_and_each_has_one_place() -> None:
    fleet = make_fleet(dp=1, pp=2, tp=2)
    names = [f"worker dp 0 pp {pp} tp {tp}" for pp in range(2) for tp in range(2)]
    assert fleet.missing() == ["engine dp 0", *names, "API server"]
    fleet.hear(3, worker(2), 0)
    assert fleet.missing() == ["engine dp 0", names[0], names[1], names[3], "API server"]
    for index, reason in ((2, f"{names[2]} .* is here already"), (4, "worker 4 of dp 0 .* has no place")):
        (refused,) = fleet.hear(10 + index, worker(index), 0)
        assert isinstance(refused.message, Refused)
        assert re.match(reason, refused.message.reason)
    fleet.lost(3, 1)
    assert fleet.ended is not None
    assert fleet.ended.reason.startswith(f"{names[2]} (pid 202 on here) died")


def test_an_engine_that_waits_while_it_starts_names_the_workers_that_do_not_wait_themselves() -> None:
    fleet = make_fleet(dp=1, tp=8)
    fleet.hear(20, engine(0), 0)
    for index in range(8):
        fleet.hear(index, worker(index), 0)
        beat(fleet, index, 1, phase=Phase.LOAD if index == 3 else Phase.AWAIT_READERS)
    beat(fleet, 20, 1, phase=Phase.REPLY)
    waits = 'engine dp 0 (pid 100 on here) (phase "wait for the workers\' reply"'
    reader = "worker dp 0 tp {} (pid 20{} on here) in 'load weights'"
    assert fleet.missing() == [f"{waits}: {reader.format(3, 3)})", "API server"]
    for index in range(1, 7):
        beat(fleet, index, 1, phase=Phase.LOAD)
    named = ", ".join(reader.format(index, index) for index in range(1, 5))
    assert fleet.missing() == [f"{waits}: {named}, 2 more)", "API server"]
    for index in range(8):
        beat(fleet, index, 1, phase=Phase.ASLEEP)
    assert fleet.missing() == [f"{waits})", "API server"]


def test_an_engine_that_is_ready_needs_no_workers_that_join() -> None:
    """An executor of somebody else's may have none."""
    fleet = make_fleet(dp=1, tp=2)
    fleet.hear(0, engine(0), 0.0)
    fleet.hear(9, API, 0.0)
    fleet.hear(9, Ready(), 0.0)
    assert "worker dp 0 tp 0" in fleet.missing()
    fleet.hear(0, Ready(), 0.0)
    assert fleet.ready


def test_a_wake_reaches_the_other_engines_only() -> None:
    fleet = formed(make_fleet(dp=3))
    assert sorted(send.member for send in fleet.hear(1, Wake(4), 1)) == [0, 2]


def test_a_closed_line_is_a_death_and_everybody_hears_who_died() -> None:
    fleet = formed(make_fleet())
    beat(fleet, 1, 1, step=812, phase=Phase.DISPATCH)
    sends = fleet.lost(1, 2)
    assert {send.member for send in sends} == {0, 9}
    stop = sends[0].message
    assert isinstance(stop, Stop)
    assert stop.code == 1
    assert "engine dp 1 (pid 101" in stop.reason
    assert "step 812, phase 'layer 2 dispatch'" in stop.reason


def test_the_one_who_died_is_blamed_before_the_one_who_noticed() -> None:
    fleet = formed(make_fleet())
    assert fleet.hear(0, Failure("all_gather: connection closed by peer", suspects_peer=True), 1) == []
    fleet.lost(1, 1.1)
    assert fleet.ended is not None
    assert "engine dp 1" in fleet.ended.reason


def test_a_suspicion_without_a_death_ends_the_world_after_its_grace() -> None:
    fleet = formed(make_fleet())
    fleet.hear(0, Failure("all_gather failed", suspects_peer=True), 1)
    for now in (1.5, 2.5):
        fleet.tick(now)
        assert fleet.ended is None
    fleet.tick(3.1)
    assert fleet.ended is not None
    assert "all_gather failed" in fleet.ended.reason


def test_the_operators_mistake_ends_with_code_2_and_only_its_sentence() -> None:
    fleet = make_fleet()
    fleet.hear(0, engine(0), 0)
    fleet.hear(0, Failure("port 8000 is taken", config=True), 0)
    assert fleet.ended == Stop("port 8000 is taken", 2)


def test_a_silent_member_is_named_within_ten_seconds() -> None:
    fleet = formed(make_fleet())
    for now in range(1, 30):
        for member in (0, 9):
            beat(fleet, member, float(now))
        fleet.tick(float(now))
        if fleet.ended is not None:
            break
    assert now <= 10
    assert fleet.ended is not None
    assert "engine dp 1" in fleet.ended.reason
    assert "not been heard" in fleet.ended.reason


def launcher(*ranks: int, **changes: object) -> Hello:
    values: dict[str, object] = {"role": "launcher", "pid": 300, "host": "there", "node": "there", "ranks": list(ranks)}
    return Hello(**(values | {"agreement": AGREEMENT} | changes))  # type: ignore[arg-type]


def apart(generation: int = 7) -> Fleet:
    """Rank 0 is started by the coordinator's own launcher, rank 1 by member 20; each has a server, 9 and 10."""
    fleet = make_fleet()
    fleet.generation, fleet.node, fleet.ranks_here, fleet.num_frontends = generation, "here", (0,), 2
    fleet.hear(20, launcher(1), 0)
    for dp, node in ((0, "here"), (1, "there")):
        fleet.hear(dp, engine(dp, node=node, generation=generation), 0)
        server = msgspec.structs.replace(API, node=node, pid=98 + dp, serves=[dp], generation=generation)
        fleet.hear(9 + dp, server, 0)
    for member, note in ((0, ""), (1, ""), (9, "here:1"), (10, "there:2")):
        fleet.hear(member, Ready(note), 0)
    assert fleet.ready
    return fleet


def test_a_launcher_hears_when_its_own_server_can_serve() -> None:
    fleet = make_fleet()
    fleet.ranks_here, fleet.num_frontends = (0,), 2
    fleet.hear(20, launcher(1), 0)
    sends: list[Send] = []
    for dp, node in ((0, "here"), (1, "there")):
        fleet.hear(dp, engine(dp, node=node), 0)
        fleet.hear(9 + dp, msgspec.structs.replace(API, node=node, pid=98 + dp), 0)
        fleet.hear(dp, Ready(), 0)
        sends = fleet.hear(9 + dp, Ready(f"{node}:1"), 0)
    assert answers(sends, 20) == [WorldReady(front_door="there:1")]


def test_each_launcher_may_have_another_number_of_api_servers_and_all_are_waited_for_by_name() -> None:
    fleet = make_fleet()
    fleet.num_frontends = 2
    for dp in (0, 1):
        fleet.hear(dp, engine(dp), 0)
        fleet.hear(dp, Ready(), 0)
    assert fleet.missing() == ["API server"] * 2
    here = [msgspec.structs.replace(API, node="here", pid=90 + place, place=place, places=3) for place in range(3)]
    fleet.hear(20, here[1], 0)
    fleet.hear(20, Ready("here:1"), 0)
    assert fleet.missing() == ["API server"] * 3, "two of this launcher, and one at least of the other"
    fleet.hear(21, msgspec.structs.replace(API, node="there", pid=80), 0)
    fleet.hear(22, here[0], 0)
    fleet.hear(23, here[2], 0)
    assert fleet.missing() == [
        "API server (pid 80 on here) (not listening yet)",
        "API server 0 (pid 90 on here) (not listening yet)",
        "API server 2 (pid 92 on here) (not listening yet)",
    ]
    for member in (21, 22, 23):
        assert not fleet.ready
        fleet.hear(member, Ready("here:1"), 0)
    assert fleet.ready
    fleet.lost(23, 1)
    assert fleet.ended is not None
    assert fleet.ended.reason == "API server 2 (pid 92 on here) died"


def test_whose_ranks_are_taken_is_refused_for_now_and_who_has_none_for_good() -> None:
    fleet = apart()
    for hello, words, patience in (
        (launcher(1, pid=301), "launcher of rank 1 (pid 300 on there) is here already", 14),
        (launcher(0, pid=301), "rank 0 is started by the launcher of rank 0 itself", 0),
        (launcher(2, pid=301), "in [0, 2), not [2]; rank 0 was started with --data-parallel-size 2", 0),
        (launcher(pid=301), "must start DP ranks", 0),
    ):
        (send,) = fleet.hear(50, hello, 1)
        assert isinstance(send.message, Refused)
        assert words in send.message.reason
        assert send.message.patience_seconds == patience
    assert fleet.ended is None


def test_who_was_started_for_another_generation_is_refused() -> None:
    fleet = make_fleet()
    fleet.generation = 7
    (send,) = fleet.hear(50, engine(1, generation=8), 1)
    assert isinstance(send.message, Refused)
    assert "another generation" in send.message.reason
    assert isinstance(fleet.hear(50, engine(1, generation=7), 1)[0].message, Welcome)


def test_a_launcher_with_other_options_is_refused_alone() -> None:
    fleet = make_fleet()
    (send,) = fleet.hear(50, launcher(1, agreement=AGREEMENT | {"version": '"0.0.1"'}), 1)
    assert isinstance(send.message, Refused)
    assert 'version: "' in send.message.reason
    assert fleet.ended is None


def test_worlds_are_counted_through_those_who_saw_the_last() -> None:
    fleet = make_fleet()
    fleet.hear(20, launcher(1, worlds=4), 0)
    assert fleet.view.number == 5


def test_the_end_says_whose_node_it_was() -> None:
    for member, node in ((1, "there"), (20, "there"), (0, "here")):
        fleet = apart()
        fleet.lost(member, 1)
        assert fleet.ended is not None
        assert fleet.ended.node == node


def test_a_node_that_retires_goes_once_its_server_has_left_and_nobody_has_work() -> None:
    fleet = apart()
    told = fleet.hear(20, Retire(30), 1)
    assert [send.member for send in told] == [10, 0, 1], "the other node's server goes on"
    for dp, requests in ((0, 1), (1, 0)):
        fleet.hear(dp, Unfinished(requests), 2)
    told = fleet.hear(10, Leaving("drained"), 2)
    assert [len(send.message.frontends) for send in told if isinstance(send.message, WorldView)] == [1] * len(told)
    fleet.lost(10, 2)
    for member in (0, 1, 9, 20):
        beat(fleet, member, 3)
    fleet.tick(3)
    assert fleet.ended is None, "engine 0 has a request"
    fleet.hear(0, Unfinished(0), 4)
    fleet.tick(4)
    assert fleet.ended == Stop("asked to stop, and nobody had work", 0, "there")


def test_a_node_that_retires_does_not_wait_for_ever() -> None:
    fleet = apart()
    fleet.hear(20, Retire(3), 1)
    fleet.hear(0, Unfinished(1, ["cmpl-7"]), 2)
    for member in (0, 1, 9, 20):
        beat(fleet, member, 4)
    fleet.tick(4.1)
    assert fleet.ended is not None
    assert fleet.ended.code == 0
    assert any("engine dp 0: 1 request (cmpl-7)" in line for line in fleet.take_log())


def front_end(fleet: Fleet, *, stands: bool, dp: int = 1) -> None:
    fleet.hear(dp, LineTo(address="tcp://here:1", stands=stands), 0.5)


def silent_until(fleet: Fleet, last: int) -> int:
    """The second in which the world ends while the API server says nothing; `last` if it does not."""
    for now in range(1, last):
        for member in (0, 1):
            beat(fleet, member, float(now))
        fleet.tick(float(now))
        if fleet.ended is not None:
            assert "API server (pid 99 on here) has not been heard" in fleet.ended.reason
            return now
    return last


def test_a_front_end_that_still_answers_an_engine_is_busy_and_not_dead() -> None:
    fleet = formed(make_fleet())
    front_end(fleet, stands=True)
    assert silent_until(fleet, 100) == 61, "a minute is Hello's default"


def test_the_front_end_of_a_program_may_be_busy_for_ever() -> None:
    fleet = make_fleet()
    fleet.hear(9, msgspec.structs.replace(API, patience_seconds=math.inf), 0)
    for dp in range(2):
        fleet.hear(dp, engine(dp), 0)
    for member in (0, 1, 9):
        fleet.hear(member, Ready(), 0)
    front_end(fleet, stands=True)
    assert silent_until(fleet, 5000) == 5000


def test_a_silent_front_end_that_answers_no_engine_either_is_given_up_as_soon_as_a_rank() -> None:
    fleet = formed(make_fleet())
    for dp in range(2):
        front_end(fleet, stands=True, dp=dp)
        front_end(fleet, stands=False, dp=dp)
    assert silent_until(fleet, 100) == 8


def test_a_rank_is_given_up_whatever_lines_stand() -> None:
    fleet = formed(make_fleet())
    front_end(fleet, stands=True)
    for now in range(1, 9):
        for member in (0, 9):
            beat(fleet, member, float(now))
        fleet.tick(float(now))
    assert fleet.ended is not None
    assert "engine dp 1" in fleet.ended.reason


def test_sleep_may_last_for_ever() -> None:
    fleet = formed(make_fleet(step_timeout=5))
    for now in range(1, 500):
        for member in (0, 1, 9):
            beat(fleet, member, float(now), phase=Phase.STARTING if member == 9 else Phase.ASLEEP, seconds=float(now))
        fleet.tick(float(now))
    assert fleet.ended is None


def test_a_slow_step_names_the_rank_the_others_wait_for() -> None:
    fleet = formed(make_fleet(dp=3, step_timeout=5))
    for now in range(1, 8):
        beat(fleet, 0, float(now), step=9, phase=Phase.DISPATCH, seconds=float(now))
        beat(fleet, 1, float(now), step=9, phase=Phase.EXPERTS, seconds=float(now))
        beat(fleet, 2, float(now), step=9, phase=Phase.COMBINE, seconds=float(now))
        beat(fleet, 9, float(now))
        fleet.tick(float(now))
    assert fleet.ended is not None
    assert "engine dp 1" in fleet.ended.reason
    assert "step 9, phase 'layer 2 experts'" in fleet.ended.reason
    assert "engine dp 0" not in fleet.ended.reason


def test_who_beats_a_moment_later_is_blamed_before_one_that_waits_and_beat_first() -> None:
    for phase, waits in ((Phase.EXPERTS, False), (Phase.DISPATCH, True)):
        fleet = formed(make_fleet(step_timeout=5))
        for now in range(1, 8):
            beat(fleet, 1, now - 0.1, step=9, phase=phase, seconds=now - 1.2)
            beat(fleet, 0, float(now), step=9, phase=Phase.DISPATCH, seconds=now - 0.9)
            beat(fleet, 9, float(now))
            fleet.tick(float(now))
        assert fleet.ended is not None
        assert "engine dp 1" in fleet.ended.reason
        assert ("engine dp 0" in fleet.ended.reason) == waits


def test_who_comes_seconds_later_into_an_exchange_that_hangs_is_named_with_those_that_wait_in_it() -> None:
    fleet = formed(make_fleet(step_timeout=4))
    for now in range(1, 9):
        beat(fleet, 0, float(now), step=9, phase=Phase.COMBINE, seconds=max(0.0, now - 3.5))
        beat(fleet, 1, float(now), step=9, phase=Phase.COMBINE, seconds=float(now))
        beat(fleet, 9, float(now))
        fleet.tick(float(now))
    assert fleet.ended is not None
    assert "engine dp 0" in fleet.ended.reason
    assert "engine dp 1" in fleet.ended.reason


def test_a_slow_step_is_blamed_on_who_fell_silent_in_it() -> None:
    fleet = formed(make_fleet(step_timeout=4))
    for now in range(1, 8):
        beat(fleet, 0, float(now), step=9, phase=Phase.EXPERTS, seconds=now - 2)
        if now < 3:
            beat(fleet, 1, float(now), step=9, phase=Phase.COMBINE, seconds=now - 2)
        beat(fleet, 9, float(now))
        fleet.tick(float(now))
    assert fleet.ended is not None
    assert "it waits for: engine dp 1" in fleet.ended.reason
    assert "engine dp 0" not in fleet.ended.reason


def test_what_took_long_before_the_world_was_ready_is_no_slow_step() -> None:
    fleet = make_fleet(step_timeout=2)
    for dp in range(2):
        fleet.hear(dp, engine(dp), 0)
    fleet.hear(9, API, 0)
    for member in (0, 1, 9):
        beat(fleet, member, 9.0, phase=Phase.REPLY, seconds=9)
        fleet.hear(member, Ready(), 9.1)
    assert fleet.ready
    fleet.tick(9.2)
    fleet.tick(10.5)
    assert fleet.ended is None


def test_a_coordinator_that_was_stopped_itself_blames_nobody_else() -> None:
    for happens_first in ("tick", "lost"):
        fleet = formed(make_fleet())
        fleet.tick(0.5)
        if happens_first == "tick":
            fleet.tick(15.5)
            assert fleet.ended is None
        fleet.lost(0, 15.6)
        assert fleet.ended is not None
        assert "the coordinator itself was stopped for 15 s" in fleet.ended.reason


def test_a_short_pause_of_the_coordinator_is_nobodys_silence() -> None:
    fleet = formed(make_fleet())
    for now in (1.0, 6.5, 12.0, 17.5):
        fleet.tick(now)
    assert fleet.ended is None
    for now in (18.0, 19.0, 20.0, 21.0, 22.0, 23.0, 24.0, 25.0):
        fleet.tick(now)
    assert fleet.ended is not None
    assert "not been heard" in fleet.ended.reason


def test_all_that_ever_joined_are_remembered_by_host_and_process() -> None:
    fleet = formed(make_fleet())
    fleet.hear(50, engine(1, pid=777), 1)
    fleet.lost(0, 2)
    assert fleet.welcomed == {("here", 99), ("here", 100), ("here", 101)}


def test_a_rank_that_missed_the_step_is_blamed_even_asleep() -> None:
    fleet = formed(make_fleet(step_timeout=5))
    for now in range(1, 8):
        beat(fleet, 0, float(now), step=9, phase=Phase.VOTE, seconds=float(now))
        beat(fleet, 1, float(now), step=8, phase=Phase.ASLEEP, seconds=float(now))
        beat(fleet, 9, float(now))
        fleet.tick(float(now))
    assert fleet.ended is not None
    assert "waits for: engine dp 1" in fleet.ended.reason


def test_draining_asks_the_front_end_and_its_leaving_ends_the_world_in_order() -> None:
    fleet = formed(make_fleet())
    assert fleet.drain(7, 1) == [Send(member, Drain(7)) for member in (9, 0, 1)]
    sends = fleet.hear(9, Leaving("drained"), 2)
    assert {send.member for send in sends} >= {0, 1}
    assert fleet.lost(9, 2) == []
    assert fleet.ended == Stop("drained", 0)


def test_a_drain_ends_at_its_deadline_with_a_line_that_says_which_requests_of_which_rank_are_left() -> None:
    fleet = formed(make_fleet(dp=3))
    fleet.drain(3, 1)
    fleet.hear(0, Unfinished(1, ["chat-1"]), 1)
    fleet.hear(1, Unfinished(3, ["cmpl-7", "cmpl-8"]), 1)
    fleet.hear(2, Unfinished(0), 1)
    fleet.tick(3.9)
    assert fleet.ended is None
    sends = fleet.tick(4.0)
    assert sorted(send.member for send in sends) == [0, 1, 2, 9]
    assert fleet.ended == Stop("what had not finished within --shutdown-timeout (3 s) was ended", 0)
    assert fleet.take_log() == [
        "not finished within --shutdown-timeout (3 s): engine dp 0: 1 request (chat-1); "
        "engine dp 1: 3 requests (cmpl-7, cmpl-8 and 1 more)"
    ]


def test_a_drain_whose_engines_are_done_or_say_nothing_names_who_holds_it_up() -> None:
    for unfinished, expected in (
        ([0, 1], "API server (pid 99 on here) is still sending answers"),
        ([0], "engine dp 1: has not said what it has"),
    ):
        fleet = formed(make_fleet())
        fleet.drain(0, 1)
        for member in unfinished:
            fleet.hear(member, Unfinished(0), 1)
        fleet.tick(1.5)
        assert fleet.take_log() == [f"not finished within --shutdown-timeout (0 s): {expected}"]


def test_a_stop_asked_for_while_forming_ends_at_once() -> None:
    fleet = make_fleet()
    fleet.hear(0, engine(0), 0)
    fleet.drain(30, 1)
    assert fleet.ended is not None
    assert fleet.ended.code == 0


def test_every_message_type_is_handled() -> None:
    fleet = formed(make_fleet())
    messages: list[ForFleet] = [StoreAt("a", 1), Ready(), Wake(1), Heartbeat(step=1, phase=Phase.STARTING, seconds=0)]
    for message in messages:
        assert isinstance(fleet.hear(0, message, 1), list)


def test_an_engine_that_is_ready_says_how_large_an_expert_is_to_whoever_balances() -> None:
    fleet = make_fleet(dp=2)
    balanced = Balanced(expert_bytes=0)
    fleet.rebalancer = balanced.rebalancer
    for dp in range(2):
        fleet.hear(dp, engine(dp), 0.0)
        fleet.hear(dp, Ready(expert_bytes=77), 0.0)
    fleet.rebalancer.hear_load(StepLoad(step=1, steps=1, load=skewed().tobytes()), 0.0)
    plan = balanced.propose()
    assert plan.num_moves > 0
    assert plan.num_bytes == 77 * plan.num_moves


@pytest.mark.parametrize("is_supervised", [False, True])
def test_whoever_balances_learns_which_engines_share_a_node_once_all_have_come(is_supervised: bool) -> None:
    """By their launcher; where each rank has one of its own, by the supervisor that started it."""
    fleet = make_fleet(dp=4, tp=2)
    balanced = Balanced(dp=4, tp=2, num_redundant=0)
    fleet.rebalancer = balanced.rebalancer
    fleet.has_workers = False
    for dp in (2, 0, 3, 1):
        place = "one" if dp == 0 else "other"
        names = {"node": f"launcher {dp}", "machine": place} if is_supervised else {"node": place}
        fleet.hear(dp, engine(dp, **names), 0.0)
    fleet.hear(9, API, 0.0)
    for member in (0, 1, 2, 3, 9):
        fleet.hear(member, Ready(), 0.0)
    assert fleet.ready
    assert balanced.rebalancer.situation().forecast.node_sizes == (2, 6)


# --- members that may go, and generations ----------------------------------------------------------------------------

GUEST = Hello(
    role="api",
    pid=98,
    host="there",
    address="tcp://there:2",
    agreement=AGREEMENT,
    essential=False,
    serves=[1],
)
BOTH = WorldView(engines=2, frontends=[FrontendAt("tcp://here:1"), FrontendAt("tcp://there:2", [1], essential=False)])
ALONE = WorldView(engines=2, frontends=[FrontendAt("tcp://here:1")])


def with_guest() -> Fleet:
    """The guest is member 8."""
    fleet = formed(make_fleet())
    fleet.hear(8, GUEST, 0)
    return fleet


def test_the_others_hear_of_a_front_end_that_comes_late_and_it_hears_that_the_world_is_ready() -> None:
    fleet = formed(make_fleet())
    sends = fleet.hear(8, GUEST, 0)
    assert answers(sends, 8) == [Welcome(BOTH)]
    assert [send for send in sends if send.member != 8] == [Send(member, BOTH) for member in (0, 1, 9)]
    assert WorldReady() in answers(fleet.hear(8, Ready("there:80"), 0), 8)
    assert fleet.front_door() != "there:80"


def test_a_member_that_is_not_essential_dies_without_the_world_and_the_others_hear_that_it_is_gone() -> None:
    fleet = with_guest()
    assert fleet.lost(8, 1) == [Send(member, ALONE) for member in (0, 1, 9)]
    assert fleet.ended is None
    (line,) = fleet.take_log()
    assert line.startswith("API server (pid 98 on there) died")
    assert fleet.take_log() == []


def test_a_member_that_is_not_essential_may_leave_or_fail() -> None:
    for word in (Leaving("done"), Failure("port 8000 is taken", config=True), Failure("a peer?", suspects_peer=True)):
        fleet = with_guest()
        assert [send for send in fleet.hear(8, word, 1) if send.member != 8] == []
        assert fleet.lost(8, 1) == [Send(member, ALONE) for member in (0, 1, 9)]
        for now in (2.0, 4.0, 6.0):
            fleet.tick(now)
        assert fleet.ended is None


def test_a_silent_member_that_is_not_essential_is_given_up_alone() -> None:
    fleet = with_guest()
    told = []
    for now in range(1, 10):
        for member in (0, 1, 9):
            beat(fleet, member, float(now))
        told += fleet.tick(float(now))
    assert fleet.ended is None
    assert told[0].member == 8
    assert told[0].close
    assert told[1:] == [Send(member, ALONE) for member in (0, 1, 9)]
    assert fleet.lost(8, 10.0) == []


def test_an_essential_member_ends_the_world_beside_others_that_are_not() -> None:
    fleet = with_guest()
    assert {send.member for send in fleet.lost(9, 1)} == {0, 1, 8}
    assert fleet.ended is not None
    assert fleet.ended.code == 1


def test_a_drained_world_ends_with_the_last_of_its_front_ends() -> None:
    for gone in ("leaves", "dies"):
        fleet = with_guest()
        assert fleet.drain(7, 1) == [Send(member, Drain(7)) for member in (9, 8, 0, 1)]
        fleet.hear(9, Leaving("drained"), 2)
        assert fleet.ended is None
        if gone == "leaves":
            fleet.hear(8, Leaving("drained"), 3)
        fleet.lost(8, 3)
        assert fleet.ended is not None
        assert fleet.ended.code == 0


def test_front_ends_that_serve_no_rank_of_the_world_and_engines_that_may_go_are_refused() -> None:
    for hello, reason in (
        (msgspec.structs.replace(GUEST, serves=[0, 2]), r"must serve DP ranks in \[0, 2\), not \[0, 2\]"),
        (msgspec.structs.replace(GUEST, serves=[]), r"must serve DP ranks in \[0, 2\), not \[\]"),
        (engine(0, essential=False), "engine dp 0 .* must be essential: every step needs every rank"),
    ):
        fleet = make_fleet()
        (refused,) = fleet.hear(1, hello, 0)
        assert isinstance(refused.message, Refused)
        assert re.search(reason, refused.message.reason)
        assert fleet.ended is None


def test_a_world_does_not_wait_for_members_that_are_not_essential() -> None:
    fleet = make_fleet(dp=1)
    fleet.hear(8, msgspec.structs.replace(GUEST, serves=[0]), 0)
    fleet.hear(0, engine(0), 0)
    fleet.hear(0, Ready(), 0)
    assert fleet.missing() == ["API server"]
    fleet.hear(9, API, 0)
    fleet.hear(9, Ready(), 0)
    assert fleet.ready


def test_rearrangements_are_of_the_generation_of_the_world_and_news_of_another_is_ignored() -> None:
    fleet = formed(make_fleet())
    fleet.generation = 3
    balanced = Balanced()
    fleet.rebalancer = balanced.rebalancer
    fleet.rebalancer.hear_load(StepLoad(step=1, steps=1, load=skewed().tobytes()), 0.0)
    fleet.rebalancer.apply(balanced.propose(), 0.0, why="asked for")
    (question,) = fleet.take_questions()
    orders = [opened(send.message) for send in fleet.hear_solved(solved(question), 0.0)]
    staged = [order for order in orders if isinstance(order, StageExperts)]
    assert [order.generation for order in staged] == [3, 3]
    failed = StageReport(epoch=staged[0].epoch, state="failed", reason="no room")
    assert fleet.hear(0, failed, 1.0) == []
    assert fleet.hear(0, msgspec.structs.replace(failed, generation=3), 1.0) != []


def test_what_was_worked_out_for_a_world_that_has_ended_is_dropped_with_its_reason() -> None:
    fleet = formed(make_fleet())
    fleet.rebalancer = Balanced(step_interval=4).rebalancer
    fleet.hear(0, StepLoad(step=1, steps=1, load=skewed().tobytes()), 0.0)
    (question,) = fleet.take_questions()
    fleet.end(Stop("enough", 0))
    assert fleet.hear_solved(solved(question), 1.0) == []
    assert fleet.take_log() == ["dropped what was worked out for load balancing: the world has ended"]


def test_a_guest_that_does_not_read_is_sent_away_and_the_others_go_on() -> None:
    fleet = formed(make_fleet())
    fleet.hear(8, GUEST, 0)
    sends = fleet.choked(8, 300 << 20)
    assert isinstance(sends[0].message, Stop)
    assert (sends[0].member, sends[0].close) == (8, True)
    assert "does not read what it is sent: 300 MiB wait" in sends[0].message.reason
    assert fleet.ended is None
    assert 8 not in fleet.members
    assert fleet.choked(8, 300 << 20) == []
