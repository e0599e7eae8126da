"""What bench.eplb_gain makes of its turns, and one small run of its three servers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.eplb_gain import BALANCING, FROM_START, WITHOUT, Turns, numbers_of, parse, prompts
from bench.report import Report, read_reports
from scripts.measurements import gain_part

ROOT = Path(__file__).parents[1]
PLAN = {"gain": 0.375, "balancedness_after": 1.0}
JUDGEMENT = {"gain": 0.2, "net": 0.19}
MOVED = {"epoch": 1, "failure": "", "moved_experts": 8, "judgement": JUDGEMENT}
REFUSED = {"step": 9, "skipped": "small_gain", "text": "moving 2 experts would save 0.10% of the time of a step"}


def numbers(history: list[dict[str, Any]], judgement: dict[str, float] | None = None) -> dict[str, Any]:
    turns = {
        WITHOUT: Turns([100.0, 200.0, 50.0]),
        BALANCING: Turns([130.0, 240.0, 70.0], epochs=[1, 1, 1]),
        FROM_START: Turns([150.0, 310.0, 70.0]),
    }
    state = {"history": history, "judgement": judgement, "balancedness": 0.99}
    return numbers_of(turns, PLAN, {"balancedness": 0.625}, state)


def test_what_was_reached_is_the_part_of_what_a_model_promises() -> None:
    found = numbers([MOVED, REFUSED])
    assert found["speed_up"] == {BALANCING: 1.3, FROM_START: 1.5}, "medians of the ratios of neighbours"
    assert found["modelled_speed_up"] == {"rows_alone": 1.6, "gate": 1.25}
    assert found["reached"] == {"rows_alone": 0.5, "gate": 1.2}
    assert (found["rearrangements"], found["moved_experts"], found["in_counted_turns"]) == (1, 8, 0)
    assert found["refused"] == [REFUSED["text"]]


def test_a_server_that_moved_nothing_is_judged_by_what_it_refused() -> None:
    found = numbers([REFUSED], {"gain": 0.0, "net": -0.1})
    assert found["modelled_speed_up"]["gate"] == 1.0
    assert set(found["reached"]) == {"rows_alone"}
    text = gain_part(Report("eplb_gain", "few", vars(parse([])) | {"ranks": 2}, found))
    assert "Here nothing was moved" in text
    assert str(REFUSED["text"]) in text
    assert "| balancing | 130.0 | 1.30 |" in text


def test_prompts_are_new_in_every_turn_and_the_same_for_all_servers() -> None:
    options = parse(["--requests", "3", "--input-len", "5"])
    assert prompts(options, 1) == prompts(options, 1)
    assert prompts(options, 1) != prompts(options, 2)
    assert [len(prompt) for prompt in prompts(options, 0)] == [5] * 3


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.ranks
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need a core each")
def test_three_servers_answer_by_turns_and_the_linear_one_is_uneven(tmp_path: Path) -> None:
    sizes = ("--requests", "4", "--input-len", "48", "--turns", "2", "--warm-up", "2", "--interval", "8")
    anywhere = ("--foreign-cores", "99")
    done = subprocess.run(
        [sys.executable, "-m", "bench.eplb_gain", *sizes, *anywhere, "--label", "try", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (report,) = read_reports(tmp_path)
    found: Any = report.numbers
    assert found["balancedness_linear"] <= 0.7
    assert found["balancedness_planned"] > 0.9
    assert all(len(speeds["all"]) == 2 for speeds in found["tokens_per_second"].values())
    assert found["judgement"]["expert_share"] > 0
