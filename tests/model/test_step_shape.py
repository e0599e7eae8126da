"""Rows and slots of a step, against their definition token by token."""

from __future__ import annotations

from array import array

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.model.attention.base import StepShape

PARTS = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 1, 2, 9, 40]), st.integers(0, 2)), max_size=9)


@given(parts=PARTS, block_size=st.sampled_from([1, 4, 6, 16]), as_memory=st.booleans())
def test_each_row_has_its_position_and_its_slot(
    parts: list[tuple[int, int, int]], block_size: int, as_memory: bool
) -> None:
    tables: list[list[int]] = []
    taken = 7
    for start, count, spare in parts:
        length = -(-(start + count) // block_size) + spare
        tables.append(list(range(taken + length, taken, -1)))
        taken += length + 3
    starts, counts = [start for start, _, _ in parts], [count for _, count, _ in parts]
    shape = StepShape.of(starts, counts, [array("i", table) for table in tables] if as_memory else tables, block_size)
    rows = [
        (position, table[position // block_size] * block_size + position % block_size)
        for (start, count, _), table in zip(parts, tables, strict=True)
        for position in range(start, start + count)
    ]
    assert list(zip(shape.positions_T.tolist(), shape.slots_T.tolist(), strict=True)) == rows
    assert shape.counts_S.tolist() == counts
    for index, (start, count, _) in enumerate(parts):
        first, length, at, _ = shape.sequences_S4[index].tolist()
        assert (length, at) == (count, start)
        assert first == sum(counts[:index])
        assert shape.table(index).tolist() == tables[index][: -(-(start + count) // block_size)]


@given(st.data())
def test_some_rows_of_a_step_are_a_step_behind_those_before(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    starts = [data.draw(st.integers(0, 20)) for _ in counts]
    tables = [list(range(100 * index, 100 * index + 30)) for index in range(len(counts))]
    whole = StepShape.of(starts, counts, tables, 2)
    cut = data.draw(st.integers(0, sum(counts)))
    parts = [whole.of_rows(0, cut), whole.of_rows(cut, sum(counts))]
    for name in ("positions_T", "slots_T"):
        assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(whole, name).tolist()
    for part in parts:
        firsts, rows = part.sequences_S4[:, 0].tolist(), part.counts_S.tolist()
        assert firsts == [sum(rows[:index]) for index in range(len(rows))]
        assert all(rows)
        for first, start in zip(firsts, part.sequences_S4[:, 2].tolist(), strict=True):
            assert part.positions_T[first] == start
