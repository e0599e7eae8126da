"""What every balancing policy of the table must keep."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.base.errors import ConfigError
from moe_serve.base.tables import EPLB_POLICIES
from moe_serve.eplb.placement import initial_placement
from moe_serve.eplb.policies.base import Policy, Problem, check_load, problem_of
from moe_serve.eplb.policies.shuffle import shuffle
from moe_serve.eplb.policies.static import static
from tests.eplb.problems import problems

ROOT = Path(__file__).parents[3]


def needs_even_ranks(problem: Problem) -> bool:
    """Whether the published hierarchy does not exist in this world."""
    hierarchical = problem.num_nodes > 1 and problem.num_groups % problem.num_nodes == 0
    return hierarchical and (len(set(problem.node_sizes)) > 1 or problem.num_physical % problem.num_ranks) != 0


@pytest.mark.parametrize("name", list(EPLB_POLICIES))
@given(data=st.data())
def test_a_policy_gives_a_whole_placement_of_the_same_world_or_says_why_not(name: str, data: st.DataObject) -> None:
    problem = data.draw(problems())
    policy = cast(Policy, EPLB_POLICIES.load(name))
    for current in (None, shuffle(problem)):
        asked = Problem(problem.load_LE, problem.offsets, problem.node_sizes, problem.num_groups, current, problem.seed)
        if name == "deepseek" and needs_even_ranks(problem):
            with pytest.raises(ConfigError, match="needs equally many"):
                policy(asked)
            continue
        placement = policy(asked)
        placement.check()
        assert placement.offsets == problem.offsets
        assert placement.physical_to_logical_LP.shape == (problem.num_layers, problem.num_physical)
        assert np.array_equal(placement.physical_to_logical_LP, policy(asked).physical_to_logical_LP)


def test_static_moves_nothing() -> None:
    current = initial_placement("round_robin", num_layers=2, num_experts=8, num_ranks=4, num_redundant=4)
    load = np.random.default_rng(0).integers(1, 9, (2, 8))
    assert static(problem_of(load, num_ranks=4, num_redundant=4, current=current)) is current


def test_shuffle_gives_another_placement_for_another_seed() -> None:
    load = np.ones((3, 16))
    tables = {shuffle(problem_of(load, num_ranks=4, seed=seed)).physical_to_logical_LP.tobytes() for seed in range(20)}
    assert len(tables) == 20


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (np.ones(4), "shape"),
        (np.ones((2, 3, 4)), "shape"),
        (np.ones((0, 4)), "shape"),
        (np.array([[1.0, np.nan]]), "expert 1 in layer 0 is nan"),
        (np.array([[1.0, np.inf]]), "inf"),
        (np.array([[1.0], [-2.0]]), "expert 0 in layer 1 is -2"),
        (np.zeros((2, 4)), "zero everywhere"),
        (np.array([["a"]]), "numbers"),
    ],
)
def test_a_load_that_cannot_be_is_refused(load: np.ndarray, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_load(load)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_ranks": 0}, "at least 1"),
        ({"num_ranks": 2, "num_redundant": -1}, "must not be negative"),
        ({"num_ranks": 2, "num_redundant": 9}, "9 redundant experts cannot fit.*at most 8"),
        ({"num_ranks": 2, "num_nodes": 3}, r"nodes must lie in \[1, 2\]"),
        ({"num_ranks": 2, "num_groups": 3}, "must divide the 8 experts"),
    ],
)
def test_a_world_that_cannot_be_is_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        problem_of(np.ones((1, 8)), **options)  # type: ignore[arg-type]


def test_a_present_placement_of_another_model_or_world_is_refused() -> None:
    other = initial_placement("linear", num_layers=2, num_experts=8, num_ranks=4)
    for shape, ranks, redundant in (((3, 8), 4, 0), ((2, 9), 4, 0), ((2, 8), 2, 0), ((2, 8), 4, 4)):
        with pytest.raises(ConfigError, match="another model or world"):
            problem_of(np.ones(shape), num_ranks=ranks, num_redundant=redundant, current=other)


def test_policies_stand_in_files_of_their_own_and_do_not_know_each_other() -> None:
    modules = {name: EPLB_POLICIES.target(name).partition(":")[0] for name in EPLB_POLICIES}
    assert len(set(modules.values())) == len(modules)
    for name, module in modules.items():
        imported = {
            node.module
            for node in ast.walk(ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text()))
            if isinstance(node, ast.ImportFrom)
        }
        assert not imported & (set(modules.values()) - {module}), name
