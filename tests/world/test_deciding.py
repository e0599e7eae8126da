"""A coordinator whose policy is slow or mad, that has a bug itself, or whose members do not read: real lines."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from moe_serve.base.balance_messages import BalanceAnswer, BalanceAsk, StepLoad
from moe_serve.base.commands import StageExperts
from moe_serve.base.config import Config
from moe_serve.base.messages import Hello, Ready, Stop, ToMember, Wake
from moe_serve.base.parcel import Parcel
from moe_serve.base.secret import NONCE_BYTES
from moe_serve.base.topology import Topology
from moe_serve.eplb.policies.base import Policy
from moe_serve.eplb.policies.shuffle import shuffle
from moe_serve.eplb.rearrangement import ForEngine
from moe_serve.eplb.rebalancer import Rebalancer
from moe_serve.world.handshake import answer_challenge
from moe_serve.world.link import Link, frame
from moe_serve.world.parcels import Send, answer_parcel
from tests.support import policies
from tests.support.balancing import Balanced, skewed
from tests.support.coordinator import HOST, RunningCoordinator

AGREEMENT = Config().agreement()
BLOCKED_SECONDS = 0.02
LOAD = skewed().tobytes()


@contextmanager
def running(rebalancer: Rebalancer, **options: float) -> Iterator[RunningCoordinator]:
    made = RunningCoordinator(Topology(dp=2), AGREEMENT, rebalancer=rebalancer, **options)  # type: ignore[arg-type]
    yield made
    made.close()


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def rebalancer_with(policy: Policy, **config: object) -> Rebalancer:
    return Balanced(policy=policy, step_interval=4, **config).rebalancer  # type: ignore[arg-type]


def report(link: Link, steps: int, first: int = 1) -> None:
    for step in range(first, first + steps):
        link.send(StepLoad(step=step, steps=1, load=LOAD))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (policies.raising, "TypeError"),
        (policies.words, "must return a Placement, not str"),
        (policies.of_another_world, "4 layers"),
        (policies.in_halves, "whole numbers"),
        (policies.without_a_table, "whole numbers"),
        (policies.exiting, "exited with code 3"),
        (policies.leaving, "SystemExit"),
        (policies.endless, "longer than 3 s"),
    ],
)
def test_whatever_a_policy_does_is_a_skip_with_its_reason_and_the_next_decision_is_made(
    policy: Policy, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rebalancer = rebalancer_with(policy)
    with running(rebalancer, solve_seconds=3 if policy is policies.endless else 60) as world:
        link, heard, lost = world.join(0)
        report(link, 1)
        until(lambda: rebalancer.history)
        entry = rebalancer.history[-1]
        assert entry["skipped"] == "policy_failed"
        assert words in str(entry["text"])
        until(lambda: any(words in line for line in caplog.messages))
        rebalancer.policy = "shuffle"
        report(link, 4, first=2)
        assert isinstance(heard.get(timeout=10), StageExperts)
        assert lost.empty()
        assert world.coordinator.fleet.ended is None


def test_while_a_policy_takes_its_time_everything_else_goes_on() -> None:
    rebalancer = rebalancer_with(policies.slow)
    with running(rebalancer) as world, world.watched() as spent:
        first, heard, lost = world.join(0)
        report(first, 1)
        until(lambda: rebalancer.window.num_steps == 1)
        began = time.monotonic()
        _, heard_too, _ = world.join(1)
        first.send(Wake(1))
        assert heard_too.get(timeout=1) == Wake(1), "admitted, and orders travel"
        report(first, 20, first=2)
        until(lambda: rebalancer.window.num_steps == 21, 1)
        ticked = world.coordinator.fleet._time.now
        until(lambda: world.coordinator.fleet._time.now != ticked, 1)
        assert heard.empty()
        assert time.monotonic() - began < policies.SLOW_SECONDS, "all that while it was being decided"
        orders = [each.get(timeout=15) for each in (heard, heard_too)]
        assert orders[0] == orders[1]
        assert isinstance(orders[0], StageExperts)
        assert orders[0].epoch == 1
        assert rebalancer.history == [], "nothing was decided twice"
        assert lost.empty()
    assert max(spent) < BLOCKED_SECONDS


def test_a_manual_order_does_not_wait_for_a_policy_whose_plan_is_then_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    rebalancer = rebalancer_with(policies.endless)
    with running(rebalancer) as world:
        links = [world.join(0), world.join(1), world.join(role="api")]
        for link, _, _ in links:
            link.send(Ready())
        world.wait_ready(5)
        report(links[0][0], 1)
        until(lambda: rebalancer._inquiry.is_open)
        links[2][0].send(BalanceAsk(number=1, action="apply", body=b'{"policy": "shuffle"}'))
        answer = heard_of(links[2][1], BalanceAnswer)
        assert answer.status == 202  # type: ignore[attr-defined]
        assert isinstance(heard_of(links[0][1], StageExperts), StageExperts)
        assert rebalancer.totals.skipped == {"late": 1}
        until(lambda: any("dropped what came too late: a plan" in line for line in caplog.messages))
        links[2][0].send(BalanceAsk(number=2, action="state"))
        assert b"policy_failed" not in heard_of(links[2][1], BalanceAnswer).body  # type: ignore[attr-defined]


def heard_of(heard: object, kind: type) -> ToMember:
    while True:
        message: ToMember = heard.get(timeout=10)  # type: ignore[attr-defined]
        if isinstance(message, kind):
            return message


class FaultyRebalancer(Rebalancer):
    """Has a bug where a report comes in, and one where time passes once `late` is set."""

    late = False

    def hear_load(self, load: StepLoad, now: float) -> list[ForEngine]:
        if load.step == 13:
            raise TypeError("unsupported operand")
        return super().hear_load(load, now)

    def tick(self, now: float) -> list[ForEngine]:
        if self.late:
            raise KeyError("no such epoch")
        return super().tick(now)


def faulty() -> FaultyRebalancer:
    plain = Balanced(policy=shuffle).rebalancer
    return FaultyRebalancer(plain.eplb_config, plain.topology, plain.placement, unix_time=lambda: 0.0, policy="shuffle")


def test_a_bug_of_the_state_machine_ends_the_world_under_its_own_name() -> None:
    with running(faulty()) as world:
        reporting, _, _ = world.join(0)
        _, heard, _ = world.join(1)
        report(reporting, 1, first=13)
        stop = heard.get(timeout=2)
        assert stop == Stop("the coordinator failed: TypeError: unsupported operand", 1)
        assert world.coordinator.fleet.ended == stop


def test_a_bug_in_the_tick_ends_the_world_rather_than_the_watch_over_silence() -> None:
    rebalancer = faulty()
    with running(rebalancer) as world:
        _, heard, _ = world.join(0)
        rebalancer.late = True
        assert heard.get(timeout=2) == Stop("the coordinator failed: KeyError: 'no such epoch'", 1)


def test_a_task_that_ends_unasked_ends_the_world_and_says_why() -> None:
    async def ends() -> None:
        raise ValueError("no more")

    async def just_ends() -> None:
        return

    ways = {ends: "ValueError: no more", just_ends: "without a reason"}
    for task, words in ways.items():
        with running(Balanced().rebalancer) as world:
            _, heard, _ = world.join(0)
            world.call(lambda task=task: world.coordinator._own(task(), "the watch"))  # type: ignore[misc]
            assert heard.get(timeout=2) == Stop(f"the coordinator failed: the watch ended: {words}", 1)


def test_large_records_reach_all_without_stopping_the_loop() -> None:
    body = bytes(range(256)) * (1 << 16)  # 16 MiB
    sent = answer_parcel(3, 200, Parcel.of(body))
    with running(Balanced().rebalancer) as world:
        links = [world.join(0), world.join(1), world.join(role="api")]
        with world.watched() as spent:
            time.sleep(0.1)
            sends = [Send(member, sent) for member in world.coordinator.fleet.members] * 3
            world.call(lambda: world.coordinator._send(sends))
            for _ in range(3):
                for _, heard, _ in links:
                    answer = heard_of(heard, BalanceAnswer)
                    assert answer == BalanceAnswer(number=3, status=200, body=body)
            time.sleep(0.1)
        assert max(spent) < BLOCKED_SECONDS
        assert all(lost.empty() for _, _, lost in links)


def test_a_member_that_does_not_read_is_named_before_more_waits_for_it_than_may() -> None:
    with running(Balanced().rebalancer, outbox_bytes=1 << 20) as world:
        _, heard, _ = world.join(1)
        with socket.create_connection((HOST, world.port)) as deaf:
            deaf.sendall(answer_challenge(world.token, deaf.recv(NONCE_BYTES)))
            hello = Hello(role="engine", dp=0, pid=1, host="there", agreement=AGREEMENT)
            deaf.sendall(frame(hello))
            until(lambda: len(world.coordinator.fleet.members) == 2)
            order = answer_parcel(1, 200, Parcel.of(bytes(1 << 19)))
            for _ in range(40):
                world.call(lambda: world.coordinator._send([Send(1, order)]))
                time.sleep(0.01)
            stop = heard.get(timeout=5)
        assert isinstance(stop, Stop)
        assert "engine dp 0" in stop.reason
        assert "does not read what it is sent: 1 MiB wait" in stop.reason
