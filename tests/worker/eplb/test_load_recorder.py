"""Counting which experts were chosen: every row once, prefill and decode apart, nothing for rows that are not there."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_serve.worker.eplb.load_recorder import DECODE, MAX_ROWS, MAX_STEPS, PREFILL, LoadRecorder

CPU = torch.device("cpu")
LAYERS, EXPERTS, K = 3, 7, 2


def step(seed: int, rows: int) -> tuple[list[Tensor], Tensor]:
    """Routes (S, K) by layer and which rows are decoded (S,)."""
    generator = torch.Generator().manual_seed(seed)
    routes = [torch.randint(0, EXPERTS, (rows, K), generator=generator) for _ in range(LAYERS)]
    return routes, torch.randint(0, 2, (rows,), generator=generator)


def counted_by_hand(steps: list[tuple[list[Tensor], Tensor]]) -> Tensor:
    counts = torch.zeros((LAYERS, 2, EXPERTS), dtype=torch.int64)
    for routes, decode_S in steps:
        for layer, ids_SK in enumerate(routes):
            for row, ids in enumerate(ids_SK.tolist()):
                for expert in ids:
                    counts[layer, int(decode_S[row]), expert] += 1
    return counts


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 6)), max_size=4))
def test_every_choice_of_every_row_is_counted_once(sizes: list[tuple[int, int]]) -> None:
    recorder = LoadRecorder(LAYERS, EXPERTS, CPU)
    steps = [step(seed, rows) for seed, rows in sizes]
    for routes, decode_S in steps:
        recorder.add(routes, decode_S)
    assert torch.equal(recorder.take(), counted_by_hand(steps))


def test_many_steps_and_large_ones_are_counted_in_time() -> None:
    recorder = LoadRecorder(LAYERS, EXPERTS, CPU)
    sizes = [1] * (2 * MAX_STEPS + 3) + [MAX_ROWS - 1, 2, MAX_ROWS + 5]
    steps = [step(number, rows) for number, rows in enumerate(sizes)]
    most = 0
    for routes, decode_S in steps:
        recorder.add(routes, decode_S)
        most = max(most, sum(len(kept) for _, kept in recorder._steps))
    assert most < MAX_ROWS, "what waits to be counted is bounded"
    expected = torch.zeros((LAYERS, 2, EXPERTS), dtype=torch.int64)
    for routes, decode_S in steps:
        for layer, ids_SK in enumerate(routes):
            for kind in (PREFILL, DECODE):
                expected[layer, kind] += torch.bincount(ids_SK[decode_S == kind].flatten(), minlength=EXPERTS)
    assert torch.equal(recorder.take(), expected)


def test_prefill_and_decode_have_places_of_their_own() -> None:
    recorder = LoadRecorder(1, EXPERTS, CPU)
    recorder.add([torch.tensor([[0, 1], [0, 2]])], torch.tensor([0, 1]))
    counts = recorder.take()[0]
    assert counts[PREFILL].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert counts[DECODE].tolist() == [1, 0, 1, 0, 0, 0, 0]


def test_what_was_taken_is_not_counted_again_and_does_not_change() -> None:
    recorder = LoadRecorder(LAYERS, EXPERTS, CPU)
    routes, decode_S = step(1, 5)
    recorder.add(routes, decode_S)
    taken = recorder.take()
    before = taken.clone()
    recorder.add(routes, decode_S)
    assert torch.equal(taken, before)
    assert torch.equal(recorder.take(), before)
    assert not recorder.take().any()


def test_the_routes_of_the_model_are_left_as_they_are() -> None:
    recorder = LoadRecorder(LAYERS, EXPERTS, CPU)
    routes, decode_S = step(2, 4)
    copies = [ids.clone() for ids in routes]
    recorder.add(routes, decode_S)
    assert all(torch.equal(*pair) for pair in zip(routes, copies, strict=True))
