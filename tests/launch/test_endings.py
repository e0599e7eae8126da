"""What exit codes say: of a launcher by how its world ended, of a supervisor by how its launchers did."""

from __future__ import annotations

import signal

import pytest

from moe_serve.base.messages import Stop
from moe_serve.launch.endings import LONG_SECONDS, WORLD_ENDED, Pauses, code_of_ranks, exit_code


@pytest.mark.parametrize(
    ("stop", "asked", "code"),
    [
        (Stop("engine dp 0 died", 1, "here"), False, 1),
        (Stop("engine dp 1 died", 1, "there"), False, WORLD_ENDED),
        (Stop("engine dp 1 died", 1, "there"), True, WORLD_ENDED),
        (Stop("another --block-size", 2), False, 2),
        (Stop("its port is taken", 2, "there"), False, WORLD_ENDED),
        (Stop("drained", 0, "there"), False, WORLD_ENDED),
        (Stop("drained", 0, "there"), True, 0),
        (Stop("drained", 0, "here"), True, 0),
        (Stop("step 7 has taken longer", 1, ""), False, 1),
    ],
)
def test_a_launcher_tells_an_end_of_its_own_from_one_that_others_made(stop: Stop, asked: bool, code: int) -> None:
    assert exit_code(stop, "here", asked=asked) == code


@pytest.mark.parametrize(
    ("codes", "asked", "code"),
    [
        ([0, 0], True, 0),
        ([0, -signal.SIGTERM], True, 0),
        ([], True, 0),
        ([0, WORLD_ENDED], True, WORLD_ENDED),
        ([1, 0], True, 1),
        ([1, WORLD_ENDED], False, 1),
        ([-signal.SIGKILL, WORLD_ENDED], False, 1),
        ([-signal.SIGTERM, WORLD_ENDED], False, 1),
        ([WORLD_ENDED, WORLD_ENDED], False, WORLD_ENDED),
        ([2], False, 2),
        ([1, 2, WORLD_ENDED], False, 2),
        ([0, WORLD_ENDED], False, 0),
    ],
)
def test_a_supervisor_says_the_worst_that_happened_on_its_node(codes: list[int], asked: bool, code: int) -> None:
    assert code_of_ranks(codes, asked=asked) == code


def test_pauses_grow_while_worlds_end_soon_and_no_further() -> None:
    pauses = Pauses()
    assert [pauses.after(1.0) for _ in range(6)] == [2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert pauses.after(LONG_SECONDS + 1) == 1.0
    assert pauses.after(1.0) == 2.0
