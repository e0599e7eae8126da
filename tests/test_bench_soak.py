"""What a soak and an overload conclude: growth is found and peaks are not, every check can fail; and a short soak."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import overload
from bench.footprints import Footprints, named, trend
from bench.mixed_load import MixedLoad
from bench.report import Report
from bench.serve import Timing
from bench.soak import COUNTS, GROWTH, of_answers, of_processes
from bench.soak_picture import draw
from scripts.measurements import overload_part, soak_part
from tests.test_bench import ROOT

SECONDS = [float(at) for at in range(600)]


def test_steady_growth_is_found_beneath_noise() -> None:
    noise = random.Random(1)
    found = trend(SECONDS, [100 + at / 60 + noise.uniform(-3, 3) for at in SECONDS])
    assert found.growth == pytest.approx(10, abs=1)
    assert found.per_hour == pytest.approx(60, abs=6)
    assert found.last - found.first == pytest.approx(6.7, abs=1)


def test_peaks_that_pass_are_no_growth() -> None:
    peaks = [100.0 + (60 if at % 30 < 5 else 0) for at in range(600)]
    assert trend(SECONDS, peaks).growth == pytest.approx(0, abs=0.5)


def prints_of(**measures: list[float]) -> Footprints:
    """One process, flat but for what is given."""
    flat = {"uss_mib": 40.0, "pss_mib": 50.0, "rss_mib": 70.0, "descriptors": 20, "threads": 4}
    samples = [flat | {name: values[at] for name, values in measures.items()} for at in range(len(SECONDS))]
    return Footprints({"api": psutil.Process()}, list(SECONDS), {"api": samples})


@pytest.mark.parametrize("measure", GROWTH)
def test_each_measure_that_grows_fails_its_check_and_no_other(measure: str) -> None:
    checks = of_processes(prints_of(**{measure: [50 + at / 30 for at in SECONDS]}), {"api"}, 120)
    assert [check.name for check in checks if not check.passed] == [f"{measure} is flat"]
    assert all(check.passed for check in of_processes(prints_of(), {"api"}, 120))


def test_growth_before_the_end_of_the_warm_up_does_not_count() -> None:
    grown = [min(at, 400.0) for at in SECONDS]
    assert all(check.passed for check in of_processes(prints_of(uss_mib=grown), {"api"}, 400))
    assert not all(check.passed for check in of_processes(prints_of(uss_mib=grown), {"api"}, 0))


def test_a_process_that_is_gone_or_new_fails_and_so_do_samples_that_are_missing() -> None:
    prints = prints_of()
    assert not of_processes(prints, {"api", "solver 2"}, 120)[0].passed
    assert not of_processes(prints, set(), 120)[0].passed
    prints.gone["api"] = 300.0
    assert not of_processes(prints, {"api"}, 120)[0].passed
    assert not any(check.passed for check in of_processes(prints_of(), {"api"}, 10_000)[1:])


def test_a_solver_may_be_another_one_at_the_end_but_there_must_be_one() -> None:
    prints = prints_of()
    prints.processes = {"api": psutil.Process(), "solver": psutil.Process()}
    prints.gone["solver"] = 300.0
    assert of_processes(prints, {"api", "solver"}, 120)[0].passed
    assert not of_processes(prints, {"api"}, 120)[0].passed


def load_with(**counts: int) -> MixedLoad:
    load = MixedLoad(address=None, known=[], ports=[1])  # type: ignore[arg-type]
    load.counts = Counter(dict.fromkeys(COUNTS, 9) | counts)
    return load


def test_a_stream_that_ended_an_answer_that_changed_and_an_attack_that_was_none_fail() -> None:
    def failed(**counts: int) -> list[str]:
        return [check.name for check in of_answers(load_with(**counts)) if not check.passed]

    assert failed() == []
    assert len(failed(wrong=1)) == 1
    assert failed(changed=1) == ["no answer changed"]
    for name in COUNTS:
        assert failed(**{name: 0}) == ["all of it happened"]


def test_processes_are_named_by_what_they_are_and_one_that_ends_is_told() -> None:
    command = [sys.executable, "-c", "print(flush=True); input()", "-m", "moe_serve.engine.process"]
    environment = {**os.environ, "MOE_SERVE_MEMBER": '{"dp": 1}'}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n", "an interpreter by now, no longer a copy of this one"
        prints = Footprints(named([psutil.Process(process.pid), psutil.Process()]))
        assert "engine 1" in prints.processes
        prints.take(0.0)
        process.communicate(b"\n")
        prints.take(1.0)
    assert prints.gone == {"engine 1": 1.0}
    assert len(prints.series("engine 1", "pss_mib")[1]) == 1
    assert prints.series("engine 1", "pss_mib")[1][0] > 1


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.ranks
def test_a_short_soak_does_all_it_says_and_its_result_can_be_drawn_and_read(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.soak", "--minutes", "0.15", "--label", "try", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    written = json.loads((tmp_path / "soak-try.json").read_text())
    checks = {check["name"]: check for check in written["numbers"]["checks"]}
    flat = {name for name in checks if name.endswith("is flat")}  # ten seconds tell nothing about growth
    assert {name for name, check in checks.items() if not check["passed"]} <= flat, done.stderr
    assert all(written["numbers"]["counts"][name] > 0 for name in COUNTS)
    assert (tmp_path / "soak-try.png").stat().st_size > 5000
    assert "engine 1" in soak_part(Report(**written))
    draw(Report(**written), tmp_path / "again.json")


def overloaded(**changes: Any) -> list[str]:
    """Names of the checks that fail."""
    good = [Timing(0.0, first=20.0, end=30.0) for _ in range(9)]
    refused = [Timing(0.0, end=0.01, error="HTTP 503", status=503, retry_after=5.0)]
    given = {"timings": good + refused, "after": [Timing(0.0, end=0.2)], "memory": [100.0, 150.0, 110.0]} | changes
    memory = [{"uss_mib": mib} for mib in given["memory"]]
    prints = Footprints({"api": psutil.Process()}, [0.0, 1.0, 2.0], {"api": memory})
    over = overload.Phase([0.0] * len(given["timings"]), given["timings"])
    calm = [Timing(0.0, end=0.2)]
    options = overload.parse(["--label", "x"])
    numbers = overload.numbers_of(options, prints, {"capacity": 0.5}, 10.0, over, over, calm, given["after"])
    config = {"server": {"parallel": {"data_parallel_size": 2}}} | vars(options)
    assert "x 10 requests/s" in overload_part(Report("overload", "x", config, numbers))
    checks: Any = numbers["checks"]
    return [check["name"] for check in checks if not check["passed"]]


def test_each_check_of_an_overload_can_fail() -> None:
    assert overloaded() == []
    late = [Timing(0.0, first=20.0, end=61.0), Timing(0.0, error="HTTP 503", status=503, retry_after=5.0)]
    assert overloaded(timings=late) == ["p99 of the admitted is under 60 s"]
    bare = [Timing(0.0, end=1.0), Timing(0.0, error="x", status=503, retry_after=5.0), Timing(0.0, error="HTTP 503")]
    assert overloaded(timings=bare) == ["whoever is not admitted gets 503 with Retry-After"]
    assert overloaded(timings=bare[:1]) == ["there was an overload"]
    assert overloaded(memory=[100.0, 150.0, 190.0]) == ["memory is flat"]
    assert overloaded(after=[Timing(0.0, end=2.0)]) == ["normal 2 s after the load has gone"]
    assert overloaded(after=[Timing(0.0, error="HTTP 503")]) == ["normal 2 s after the load has gone"]
