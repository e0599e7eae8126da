"""The benchmarks' own arithmetic, and one small run of each with real engines."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import experts
from bench.http_stream import Address
from bench.offline import Run, alternate, compare_tokens, numbers_of, random_prompts
from bench.report import Report, describe_machine, markdown_table, percentiles, read_reports
from bench.serve import Timing, draw, poisson, summary
from scripts.measurements import compared_table, pipeline_part

ROOT = Path(__file__).parents[1]


def test_percentiles_lie_between_the_values_around_them() -> None:
    assert percentiles([4.0, 1.0, 2.0, 3.0, 5.0]) == {"p50": 3.0, "p90": 4.6, "p99": 4.96}
    assert percentiles([0.5], 1000) == {"p50": 500.0, "p90": 500.0, "p99": 500.0}
    assert percentiles([]) == {"p50": None, "p90": None, "p99": None}


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = Report("offline", "small", {"seed": 1}, {"tokens_per_second": 2.5})
    path = report.write(tmp_path / "machine")
    assert path.name == "offline-small.json"
    assert read_reports(tmp_path) == [report]


def test_a_machine_is_named_so_that_a_folder_may_bear_it() -> None:
    name = str(describe_machine()["name"])
    assert name.endswith("cores")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_a_markdown_table_has_a_line_per_row() -> None:
    assert markdown_table(["a", "b"], [[1, "x"]]) == "| a | b |\n|---|---|\n| 1 | x |"


def test_arrivals_come_at_the_rate_asked_for_and_are_repeatable() -> None:
    arrivals = poisson(50.0, 100.0, random.Random(3))
    assert arrivals == poisson(50.0, 100.0, random.Random(3))
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] < 100.0
    assert 4700 < len(arrivals) < 5300
    assert poisson(0.001, 0.1, random.Random(0)) == [0.0]


def test_contestants_take_turns_on_the_same_prompts_and_the_first_turn_does_not_count() -> None:
    asked: list[tuple[str, list[list[int]]]] = []

    def contestant(name: str) -> Any:
        def generate(prompts: list[list[int]]) -> list[list[int]]:
            asked.append((name, prompts))
            return prompts

        return generate

    batches = [random_prompts(2, 3, 100, seed) for seed in range(3)]
    runs = alternate({"moe_serve": contestant("ours"), "transformers": contestant("theirs")}, batches)
    assert asked == [(name, batch) for batch in batches for name in ("ours", "theirs")]
    assert runs["moe_serve"].answers == batches[1:]
    assert len({str(batch) for batch in batches}) == 3


def test_the_ratio_is_that_of_each_repetition_and_unequal_answers_are_counted() -> None:
    answers = [[[1, 2], [3, 4]]]
    runs = {"moe_serve": Run([0.5], answers), "transformers": Run([1.0], [[[1, 2], [3, 5]]])}
    numbers: Any = numbers_of(runs)
    assert numbers["moe_serve_output_tokens_per_second"]["median"] == 8.0
    assert numbers["ratio"]["median"] == 2.0
    assert (numbers["answers"], numbers["equal_answers"], numbers["first_difference"]) == (2, 1, [1])
    assert compare_tokens(answers, answers)["equal_answers"] == 2


def test_failed_requests_are_counted_and_their_times_are_not() -> None:
    good = Timing(0.0, first=0.1, gaps=[0.02, 0.04], end=0.2, num_tokens=3)
    found: Any = summary([good, Timing(0.3, error="HTTP 503")], 2.0)
    assert (found["requests"], found["failed"], found["errors"]) == (2, 1, ["HTTP 503"])
    assert found["ttft_ms"]["p99"] == 100.0
    assert found["itl_ms"]["p50"] == 30.0
    assert found["output_tokens_per_second"] == 1.5


def test_rates_at_which_nothing_was_answered_can_be_drawn(tmp_path: Path) -> None:
    empty = summary([Timing(0.0, error="HTTP 503")], 1.0)
    full = summary([Timing(0.0, first=0.1, gaps=[0.02], end=0.2, num_tokens=2)], 1.0)
    rates = [{"rate": 1.0} | full, {"rate": 2.0} | empty]
    report = Report("serve", "x", {"input_len": 1, "output_len": 2}, {"rates": rates})
    draw(report, tmp_path / "picture.json")
    assert (tmp_path / "picture.png").stat().st_size > 5000
    assert "<svg" in (tmp_path / "picture.svg").read_text()


@pytest.mark.parametrize("url", ["ftp://host:1", "http://", "http://host:8000/v1"])
def test_an_address_that_is_no_server_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http://host:port"):
        Address.parse(url)


def run(module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.long
def test_offline_measures_both_and_finds_the_same_tokens(tmp_path: Path) -> None:
    sizes = ("--num-requests", "3", "--input-len", "12", "--output-len", "6", "--repetitions", "1")
    run("bench.offline", *sizes, "--label", "try", "--out", str(tmp_path))
    numbers = json.loads((tmp_path / "offline-try.json").read_text())["numbers"]
    assert (numbers["answers"], numbers["equal_answers"]) == (3, 3)
    assert numbers["moe_serve_output_tokens_per_second"]["median"] > 0
    assert numbers["transformers_output_tokens_per_second"]["median"] > 0


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.long
def test_serve_starts_a_server_and_answers_everything_that_arrives(tmp_path: Path) -> None:
    sizes = ("--rates", "3", "9", "--seconds", "1", "--input-len", "12", "--output-len", "6", "--warm-up", "1")
    server = ("--", "--kv-cache-memory-bytes", str(2**24), "--max-model-len", "512")
    run("bench.serve", *sizes, "--label", "try", "--out", str(tmp_path), *server)
    report = json.loads((tmp_path / "serve-try.json").read_text())
    for row in report["numbers"]["rates"]:
        assert row["requests"] > 0
        assert row["failed"] == 0, row["errors"]
        assert 0 < row["ttft_ms"]["p50"] <= row["e2e_ms"]["p50"]
    assert report["config"]["server"]["scheduler"]["max_num_seqs"] == 128
    assert (tmp_path / "serve-try.png").is_file()


@pytest.mark.long
def test_a_checkout_beside_itself_computes_experts_with_equal_bits(tmp_path: Path) -> None:
    options = experts.parse(
        ["--before", str(ROOT), "--preset", "tiny", "--rows", "1", "5", "--turns", "2", "--threads", "1"]
    )
    report = experts.measure(options)
    assert list(report.numbers) == ["1 rows, passes per second", "5 rows, passes per second"]
    assert report.config["turns_with_equal_bits"] == {"1": 2, "5": 2}
    report.write(tmp_path / "machine")
    (line,) = (line for line in compared_table(read_reports(tmp_path)).splitlines() if "5 rows" in line)
    assert line.startswith("| experts of tiny in bfloat16, 1 threads | 5 rows | ")


@pytest.mark.long
@pytest.mark.ranks
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two stages need a core each")
def test_as_many_flights_as_stages_give_the_answers_of_one_on_stages_that_have_a_core_each(tmp_path: Path) -> None:
    sizes = ("--num-requests", "6", "--input-len", "12", "--output-len", "8", "--turns", "2")
    run("bench.pipeline", *sizes, "--label", "try", "--out", str(tmp_path))
    (report,) = read_reports(tmp_path)
    numbers: Any = report.numbers
    assert (numbers["answers"], numbers["equal_answers"]) == (12, 12)
    assert {flights: len(speed["all"]) for flights, speed in numbers["output_tokens_per_second"].items()} == {
        "1": 2,
        "2": 2,
    }
    assert all(0 < share <= 1.1 for shares in numbers["busy_share_of_stages"].values() for share in shares)
    assert "| 2, as many as stages | " in pipeline_part(report)
