"""The process that works questions out: it measures its own time, and does not outlive whoever asks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from moe_serve.eplb.forecast import Forecast
from moe_serve.eplb.placement import initial_placement
from moe_serve.eplb.policies.base import Policy
from moe_serve.eplb.questions import Planned, PlanQuestion, Situation, Solved, Unsolved
from moe_serve.eplb.solving import solve
from moe_serve.world.solver import Solver
from tests.support import policies
from tests.support.balancing import name_of

ASKER = """
import asyncio
from tests.world.test_solver import question
from tests.support import policies
from moe_serve.world.solver import Solver

async def main():
    solver = Solver(print)
    running = asyncio.create_task(solver.run())
    solver.ask(question(policies.endless))
    while solver._process is None:
        await asyncio.sleep(0.01)
    await asyncio.sleep(1)
    print(solver._process.pid, flush=True)
    await running

asyncio.run(main())
"""


def question(policy: Policy, number: int = 1) -> PlanQuestion:
    placement = initial_placement("linear", num_layers=2, num_experts=8, num_ranks=2, num_redundant=2)
    load_LE = np.arange(16, dtype=np.float64).reshape(2, 8)
    situation = Situation(3, load_LE, placement, Forecast((1, 1), True, 1000), num_groups=1, seed=5)
    return PlanQuestion(number=number, situation=situation, policy=name_of(policy))


def answers_to(*questions: PlanQuestion) -> list[Solved]:
    async def ask() -> list[Solved]:
        answers: asyncio.Queue[Solved] = asyncio.Queue()
        solver = Solver(answers.put_nowait)
        running = asyncio.create_task(solver.run())
        for each in questions:
            solver.ask(each)
        found = [await asyncio.wait_for(answers.get(), 15) for _ in questions]
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        return found

    return asyncio.run(ask())


def test_an_answer_from_the_process_is_the_answer_worked_out_here() -> None:
    asked = question(policies.shuffle)
    (answer,) = answers_to(asked)
    here, _ = solve(asked)
    assert isinstance(answer.result, Planned)
    assert isinstance(here, Planned)
    there, mine = answer.result.proposal, here.proposal
    assert np.array_equal(there.placement.physical_to_logical_LP, mine.placement.physical_to_logical_LP)
    assert (there.gain, there.chunks, there.epoch) == (mine.gain, mine.chunks, 3)


def test_the_time_of_an_answer_is_that_of_the_work_not_of_the_way_or_the_wait() -> None:
    first, second = answers_to(question(policies.slow), question(policies.shuffle, 2))
    assert (first.number, second.number) == (1, 2)
    assert first.seconds >= policies.SLOW_SECONDS
    assert second.seconds < policies.SLOW_SECONDS / 2


def test_a_death_is_a_reason_and_the_next_question_gets_a_new_process() -> None:
    first, second = answers_to(question(policies.exiting), question(policies.shuffle, 2))
    assert first.result == Unsolved("the process that works it out exited with code 3")
    assert isinstance(second.result, Planned)


def test_a_question_that_cannot_be_read_is_no_reason_to_wait() -> None:
    broken = msgspec.structs.replace(question(policies.shuffle), policy=7)  # type: ignore[arg-type]
    (answer,) = answers_to(broken)
    assert answer.result == Unsolved("the process that works it out exited with code 1")


def test_the_process_does_not_outlive_whoever_asked_not_even_amid_an_endless_policy() -> None:
    with subprocess.Popen([sys.executable, "-c", ASKER], stdout=subprocess.PIPE) as asker:
        assert asker.stdout is not None
        pid = int(asker.stdout.readline())
        assert is_alive(pid)
        os.kill(asker.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while is_alive(pid):
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
