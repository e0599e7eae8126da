"""Placement files: they come back as written, and each thing that can be wrong with one is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_serve.base.errors import ConfigError
from moe_serve.eplb.placement import Placement, initial_placement
from moe_serve.eplb.placement_file import (
    placement_from_document,
    placement_to_document,
    read_placement,
    write_placement,
)

GOOD: dict[str, Any] = {
    "num_ranks": 2,
    "num_nodes": 1,
    "physical_to_logical": [[0, 1, 2, 0], [2, 1, 0, 1]],
    "rank_of_slot": [0, 0, 1, 1],
}


def test_a_placement_comes_back_as_written(tmp_path: Path) -> None:
    placement = initial_placement("round_robin", num_layers=3, num_experts=10, num_ranks=4, num_redundant=3)
    write_placement(tmp_path / "p.json", placement, num_nodes=2)
    document = json.loads((tmp_path / "p.json").read_text())
    assert list(document) == ["num_ranks", "num_nodes", "physical_to_logical", "rank_of_slot"]
    assert document["num_nodes"] == 2
    found = read_placement(tmp_path / "p.json", num_layers=3, num_experts=10, num_ranks=4, num_redundant=3)
    assert np.array_equal(found.physical_to_logical_LP, placement.physical_to_logical_LP)
    assert found.offsets == placement.offsets
    assert found.num_logical == 10


def test_slots_in_any_order_of_ranks_are_sorted_by_rank() -> None:
    mixed = {**GOOD, "physical_to_logical": [[0, 2, 1, 0]], "rank_of_slot": [0, 1, 0, 1]}
    placement = placement_from_document(mixed)
    assert placement.physical_to_logical_LP.tolist() == [[0, 1, 2, 0]]
    assert placement.offsets == (0, 2, 4)


def test_a_rank_may_have_no_slots() -> None:
    placement = placement_from_document({**GOOD, "num_ranks": 3, "rank_of_slot": [0, 0, 2, 2]})
    assert placement.offsets == (0, 2, 2, 4)
    assert placement_to_document(placement)["rank_of_slot"] == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_ranks": 0}, "num_ranks must be a whole number of at least 1, not 0"),
        ({"num_ranks": "2"}, "num_ranks"),
        ({"num_ranks": True}, "num_ranks"),
        ({"num_nodes": -1}, "num_nodes"),
        ({"physical_to_logical": None}, "physical_to_logical"),
        ({"physical_to_logical": [0, 1, 2, 0]}, "list of equally long lists"),
        ({"physical_to_logical": [[0, 1, 2, 0], [0, 1]]}, "rows differ in length"),
        ({"physical_to_logical": [[0, 1, 2, 0.5], [0, 1, 2, 0]]}, "physical_to_logical"),
        ({"physical_to_logical": [[0, 1, 2, 2**70], [0, 1, 2, 0]]}, "physical_to_logical"),
        ({"physical_to_logical": []}, "physical_to_logical"),
        ({"rank_of_slot": [0, 0, 1]}, "4 slots a layer, rank_of_slot has 3"),
        ({"rank_of_slot": [0, 0, 1, 2]}, "names rank 2, but the ranks are 0 to 1"),
        ({"rank_of_slot": [0, 0, 1, -1]}, "names rank -1"),
        ({"rank_of_slot": "0011"}, "rank_of_slot"),
        ({"physical_to_logical": [[0, 1, 2, 0], [0, 1, 1, 0]]}, r"layer 1 holds no copy of experts \[2\]"),
        ({"physical_to_logical": [[0, 1, 2, -1], [0, 1, 2, 0]]}, "holds expert -1"),
    ],
)
def test_a_broken_document_is_refused_with_what_is_wrong(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        placement_from_document({**GOOD, **change}, num_experts=3)


@pytest.mark.parametrize("missing", ["num_ranks", "physical_to_logical", "rank_of_slot"])
def test_a_missing_key_is_named(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"lacks {missing}"):
        placement_from_document({key: value for key, value in GOOD.items() if key != missing})


@pytest.mark.parametrize(
    ("world", "words"),
    [
        ({"num_ranks": 4}, "is for 2 ranks, but this world spreads experts over 4"),
        ({"num_layers": 5}, "has 2 layers, but this model has 5"),
        ({"num_experts": 2}, "holds expert 2, but this model's experts are 0 to 1"),
        ({"num_experts": 4}, r"holds no copy of experts \[3\]"),
        ({"num_redundant": 2}, "1 redundant, but num_redundant_experts is 2"),
    ],
)
def test_a_placement_for_another_model_or_world_is_refused(world: dict[str, int], words: str) -> None:
    placement_from_document(GOOD, num_layers=2, num_experts=3, num_ranks=2, num_redundant=1)
    with pytest.raises(ConfigError, match=words):
        placement_from_document(GOOD, **world)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[1, 2]", "null", "\ud800"])
def test_a_file_that_holds_no_placement_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ConfigError, match=r"p\.json"):
        read_placement(path)


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json cannot be read: No such file"):
        read_placement(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_placement(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_placement(tmp_path / "no" / "p.json", Placement(np.zeros((1, 1), dtype=np.int64), (0, 1), 1))
