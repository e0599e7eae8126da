"""A rank's trace: good JSON whenever its process ends, and never anybody's trouble."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from moe_serve.base import trace
from moe_serve.base.trace import ChromeTrace


def events_of(path: Path) -> list[dict[str, Any]]:
    """As viewers read it: the end of the array may be missing."""
    events: list[dict[str, Any]] = json.loads(path.read_text().rstrip(",\n") + "]")
    return events


def test_spans_are_on_named_tracks_of_a_named_rank(tmp_path: Path) -> None:
    written = ChromeTrace(tmp_path / "run.json", 3)
    began = time.perf_counter()
    written.add("experts", "computes", began, step=7, layer=2)
    written.add("dispatch", "rows travel", began, step=7, layer=2)
    assert events_of_nothing(written.path)
    written.flush()
    written.flush()
    assert written.path == tmp_path / "run.rank3.json"
    rank, computes, experts, travels, dispatch = events_of(written.path)
    assert (rank["args"]["name"], computes["args"]["name"], travels["args"]["name"]) == (
        "rank 3",
        "computes",
        "rows travel",
    )
    assert (experts["tid"], dispatch["tid"]) == (computes["tid"], travels["tid"])
    assert (experts["name"], experts["ph"], experts["pid"], experts["args"]) == (
        "experts",
        "X",
        3,
        {"step": 7, "layer": 2},
    )
    assert experts["ts"] == pytest.approx(1e6 * began, abs=1)
    assert 0 <= experts["dur"] <= dispatch["dur"]


def events_of_nothing(path: Path) -> bool:
    return path.read_text() == "[\n"


def test_a_trace_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(trace, "MOST_SPANS", 5)
    written = ChromeTrace(tmp_path / "run.json", 0)
    for step in range(9):
        written.add("experts", "computes", 0.0, step=step, layer=0)
    written.flush()
    assert [event["args"]["step"] for event in events_of(written.path) if event["ph"] == "X"] == [0, 1, 2, 3, 4]
    assert "later ones are not kept" in caplog.text


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = ChromeTrace(tmp_path / "nowhere" / "run.json", 0)
    written.add("experts", "computes", 0.0, step=1, layer=0)
    written.flush()
    assert caplog.text.count("the trace cannot be written") == 1
