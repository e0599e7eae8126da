"""A small world of `bench.scale`: a real coordinator, every event, numbers that follow from the sizes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from bench import scale
from bench.report import Report
from bench.scale_coordinator import Shape
from bench.scale_world import world_of

RANKS, LAYERS = 8, 2


async def life() -> list[dict[str, Any]]:
    with world_of(Shape(RANKS, layers=LAYERS, experts=16, node_size=4), lambda _: None) as world:
        await world.meet()
        await world.wake_by_all()
        await world.rearrange()
        await world.even_out()
        await world.lose_one()
        return world.events


@pytest.mark.long
def test_the_events_of_a_world_take_as_many_messages_as_its_ranks_ask_for(tmp_path: Path) -> None:
    events = asyncio.run(life())
    found = {row["event"]: row for row in events}
    assert found["meet"]["messages_in"] == 2 * RANKS + 1 + 2 + 1, "hello and ready, the store, two others say hello"
    assert (found["wake by all"]["messages_in"], found["wake by all"]["messages_out"]) == (RANKS, RANKS - 1)
    moved = found["rearrange"]
    assert moved["chunks"] == LAYERS
    assert (moved["messages_in"], moved["messages_out"]) == (1 + 2 * LAYERS * RANKS, LAYERS * RANKS)
    slots = Shape(RANKS, layers=LAYERS, experts=16).redundant + 16
    assert found["new shares"]["messages_out"] == RANKS
    assert RANKS * LAYERS * slots * 4 < found["new shares"]["bytes_out"] < RANKS * (LAYERS * slots * 4 + 150)
    assert found["lose one rank"]["messages_out"] == RANKS + 1
    assert all(row["cpu_ms"] > 0 and row["turn_ms"] >= row["step_ms"] > 0 for row in events)
    report = Report("scale", "try", {"sizes": [RANKS]}, {"events": events, "elsewhere": []})
    scale.draw(report, tmp_path / "scale-try.json")
    assert (tmp_path / "scale-try.png").stat().st_size > 5000
