"""Expert load of the last steps: what is in the window, and what a recording holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from moe_serve.eplb.window import MAX_PARTS, LoadWindow, Recording

LAYERS, EXPERTS = 2, 3


def bucket(value: int) -> bytes:
    return np.full((LAYERS, 2, EXPERTS), value, dtype=np.int64).tobytes()


def test_a_new_window_is_empty() -> None:
    window = LoadWindow(LAYERS, EXPERTS, 10)
    assert window.num_steps == 0
    assert window.load().shape == (LAYERS, 2, EXPERTS)
    assert not window.load().any()


def test_prefill_and_decode_are_kept_apart() -> None:
    window = LoadWindow(LAYERS, EXPERTS, 10)
    counts = np.arange(LAYERS * 2 * EXPERTS, dtype=np.int64).reshape(LAYERS, 2, EXPERTS)
    assert (window.add(1, counts.tobytes()) == counts).all()
    assert (window.load() == counts).all()


@given(st.integers(1, 20), st.lists(st.integers(1, 9), max_size=30))
def test_the_window_holds_the_newest_buckets_that_just_fill_it(size: int, steps: list[int]) -> None:
    window = LoadWindow(1, 1, size)
    for number, each in enumerate(steps):
        window.add(each, np.array([[[10**number % 997], [0]]], dtype=np.int64).tobytes())
    kept = 0
    while kept < len(steps) and sum(steps[len(steps) - kept :]) < size:
        kept += 1
    newest = range(len(steps) - kept, len(steps))
    assert window.num_steps == sum(steps[number] for number in newest)
    assert window.load().sum() == sum(10**number % 997 for number in newest)


def test_the_newest_steps_alone_can_be_asked_for() -> None:
    window = LoadWindow(LAYERS, EXPERTS, 100)
    for value in (1, 2, 4, 8):
        window.add(5, bucket(value))
    found = [int(window.load(steps)[0, 0, 0]) for steps in (1, 5, 6, 20, 1000)]
    assert found == [8, 8, 12, 15, 15]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_the_parts_of_a_window_are_few_and_add_up_to_it(steps: list[int]) -> None:
    window = LoadWindow(LAYERS, EXPERTS, 1000)
    for number, each in enumerate(steps):
        window.add(each, bucket(number), 2.0, [0.5, 0.25])
    parts = window.parts()
    assert min(len(steps), MAX_PARTS) / 2 <= len(parts) <= MAX_PARTS
    assert sum(part.steps for part in parts) == window.num_steps
    assert (sum(part.load_LE for part in parts) == window.load().sum(axis=1)).all()
    assert sum(part.step_seconds for part in parts) == 2 * len(steps)
    assert np.sum([part.expert_seconds_R for part in parts], axis=0).tolist() == [0.5 * len(steps), 0.25 * len(steps)]


def test_seconds_are_told_only_where_they_are_those_of_the_present_placement() -> None:
    window = LoadWindow(LAYERS, EXPERTS, 1000)
    window.add(5, bucket(1), 0.0, [1.0, 2.0])
    window.add(5, bucket(1))
    assert [part.expert_seconds_R for part in window.parts()] == [[1.0, 2.0], []]
    window.forget_seconds()
    for number in range(3):
        window.add(5, bucket(1), 0.0, [float(number), 1.0])
    assert [part.expert_seconds_R for part in window.parts()] == [[], [], [], [1.0, 1.0], [2.0, 1.0]]


def test_a_bucket_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="reshape"):
        LoadWindow(LAYERS, EXPERTS, 10).add(1, bucket(1)[:-8])


def test_a_recording_is_a_file_of_counts_by_step_layer_and_expert() -> None:
    recording = Recording()
    recording.start()
    for value in (1, 5):
        recording.add(np.full((LAYERS, 2, EXPERTS), value, dtype=np.int64))
    counts = load(recording.dump({"steps": "2"}).join())["logical_count"]
    assert counts.dtype == np.int64
    assert counts.tolist() == [[[2] * EXPERTS] * LAYERS, [[10] * EXPERTS] * LAYERS]


def test_a_full_recording_stops_and_keeps_what_it_has_until_it_is_started_anew() -> None:
    recording = Recording(limit=2 * LAYERS * EXPERTS * 8)
    recording.start()
    for _ in range(4):
        recording.add(np.ones((LAYERS, 2, EXPERTS), dtype=np.int64))
    assert (recording.on, recording.full, len(recording.steps)) == (False, True, 2)
    recording.start()
    assert (recording.on, recording.full, len(recording.steps)) == (True, False, 0)
