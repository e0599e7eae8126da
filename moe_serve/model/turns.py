"""Computations that stop where they would wait, so that others can go on meanwhile."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

Value = TypeVar("Value")
Turns = Generator[None, None, Value]


def take_turns(runs: Sequence[Turns[Value]]) -> list[Value]:
    """Each goes on until it yields, then the next one; what they return, in order."""
    made: dict[int, Value] = {}
    while len(made) < len(runs):
        for index, run in enumerate(runs):
            if index not in made:
                try:
                    next(run)
                except StopIteration as stop:
                    made[index] = stop.value
    return [made[index] for index in range(len(runs))]
