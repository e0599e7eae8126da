"""The benchmark of counting load, on a few steps: it measures what it says, and counts nothing twice."""

from __future__ import annotations

from pathlib import Path

from bench.eplb_recorder_overhead import Engine, measure, parse
from moe_serve.cli.random_model import make_model


def test_it_measures_the_parts_that_only_a_watching_engine_has(tmp_path: Path) -> None:
    options = parse(["--steps", "6", "--sequences", "2"])
    folder = make_model(tmp_path / "model")
    numbers = measure(options, folder).numbers
    assert set(numbers) == {
        "step_ms",
        "add_us",
        "hashes_us",
        "collect_us_per_step",
        "parts_percent_of_step",
        "difference_percent_of_step",
    }
    assert isinstance(numbers["step_ms"], float)
    assert numbers["step_ms"] > 0
    engine = Engine(folder, options, watches=False)
    engine.begin(2, 4)
    engine.step()
    assert (len(engine.steps.seconds), len(engine.add.seconds)) == (1, 0)
