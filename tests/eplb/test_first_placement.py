"""The placement a world starts with: by strategy or from a file, with redundant slots or without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.eplb.first_placement import first_placement
from moe_serve.eplb.placement import Placement


def placed(num_layers: int = 2, num_experts: int = 4, **options: Any) -> Placement:
    values = {"enable_expert_parallel": True, "data_parallel_size": 2}
    parallel = Config.from_flat(values | options).parallel
    return first_placement(parallel, num_layers=num_layers, num_experts=num_experts)


def redundant(count: int) -> dict[str, object]:
    return {"enable_eplb": True, "eplb_config": {"num_redundant_experts": count}}


def write(path: Path, rows: list[list[int]], ranks: list[int], num_ranks: int = 2) -> dict[str, object]:
    """A placement file; the option that names it."""
    document = {"num_ranks": num_ranks, "num_nodes": 1, "physical_to_logical": rows, "rank_of_slot": ranks}
    path.write_text(json.dumps(document))
    return {"expert_placement_file": str(path)}


def test_without_more_every_expert_has_one_slot_by_the_strategy() -> None:
    assert placed().physical_to_logical_LP.tolist() == [[0, 1, 2, 3]] * 2
    dealt = placed(expert_placement_strategy="round_robin")
    assert dealt.physical_to_logical_LP.tolist() == [[0, 2, 1, 3]] * 2


def test_experts_are_spread_over_all_ranks_of_all_engines() -> None:
    assert placed(tensor_parallel_size=2).num_ranks == 4


@given(
    st.sampled_from(["linear", "round_robin"]),
    st.integers(1, 20),
    st.integers(2, 6),
    st.integers(0, 12),
)
def test_redundant_slots_hold_second_copies_and_ranks_stay_even(
    strategy: str, experts: int, ranks: int, count: int
) -> None:
    count = min(count, experts * (ranks - 1))
    placement = placed(
        num_experts=experts, data_parallel_size=ranks, expert_placement_strategy=strategy, **redundant(count)
    )
    placement.check()
    assert placement.num_redundant == count
    sizes = [len(placement.slots_of(rank)) for rank in range(ranks)]
    assert max(sizes) - min(sizes) <= 1
    assert placement.copies().max() <= 1 + -(-count // experts)


def test_a_file_goes_before_the_strategy_and_may_be_ragged(tmp_path: Path) -> None:
    option = write(tmp_path / "p.json", [[3, 2, 1, 0], [0, 1, 2, 3]], [0, 0, 0, 1])
    placement = placed(**option)
    assert placement.physical_to_logical_LP.tolist() == [[3, 2, 1, 0], [0, 1, 2, 3]]
    assert placement.offsets == (0, 3, 4)


def test_a_file_may_put_two_copies_on_one_rank(tmp_path: Path) -> None:
    option = write(tmp_path / "p.json", [[0, 0, 1, 2, 3, 1]] * 2, [0, 0, 0, 1, 1, 1])
    assert placed(**option, **redundant(2)).num_duplicates() == 2


def test_all_ranks_read_the_same_whatever_order_the_slots_are_listed_in(tmp_path: Path) -> None:
    option = write(tmp_path / "p.json", [[0, 1, 2, 3]] * 2, [1, 0, 1, 0])
    assert placed(**option).physical_to_logical_LP.tolist() == [[1, 3, 0, 2]] * 2


@pytest.mark.parametrize(
    ("rows", "ranks", "num_ranks", "more", "words"),
    [
        ([[0, 1, 2, 3]] * 2, [0, 1, 2, 2], 3, {}, "is for 3 ranks, but this world spreads experts over 2"),
        ([[0, 1, 2, 3]] * 3, [0, 0, 1, 1], 2, {}, "has 3 layers, but this model has 2"),
        ([[0, 1, 2, 2]] * 2, [0, 0, 1, 1], 2, {}, r"holds no copy of experts \[3\]"),
        ([[0, 1, 2, 3, 4]] * 2, [0, 0, 1, 1, 1], 2, {}, "holds expert 4, but this model's experts are 0 to 3"),
        ([[0, 1, 2, 3, 3]] * 2, [0, 0, 1, 1, 1], 2, {}, "1 redundant, but num_redundant_experts is 0"),
        ([[0, 1, 2, 3]] * 2, [0, 0, 1, 1], 2, redundant(2), "0 redundant, but num_redundant_experts is 2"),
    ],
)
def test_a_file_of_another_model_or_world_is_refused_in_one_sentence(
    tmp_path: Path, rows: list[list[int]], ranks: list[int], num_ranks: int, more: dict[str, object], words: str
) -> None:
    option = write(tmp_path / "p.json", rows, ranks, num_ranks)
    with pytest.raises(ConfigError, match=words) as caught:
        placed(**option, **more)
    assert str(caught.value).startswith(f"placement file {tmp_path / 'p.json'}")
    assert "\n" not in str(caught.value)


def test_a_file_without_expert_parallelism_is_refused() -> None:
    with pytest.raises(ConfigError, match="expert_placement_file needs enable_expert_parallel"):
        Config.from_flat({"expert_placement_file": "p.json", "data_parallel_size": 2})


def test_more_copies_than_every_rank_can_use_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_redundant_experts 5 .* room for 4"):
        placed(num_experts=4, data_parallel_size=2, **redundant(5))
