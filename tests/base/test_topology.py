"""Rank arithmetic on the axes dp x pp x tp, and how ranges are shared out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.base.errors import ConfigError
from moe_serve.base.topology import Topology, divide, get_pp_indices, split_range

sizes = st.integers(1, 4)
topologies = st.builds(Topology, dp=sizes, pp=sizes, tp=sizes)


def layers_per_stage(num_layers: int, stages: int) -> list[int]:
    parts = [get_pp_indices(num_layers, stage, stages) for stage in range(stages)]
    return [end - start for start, end in parts]


@given(topologies)
def test_a_rank_and_its_coordinates_are_two_names_of_one_thing(topology: Topology) -> None:
    coordinates = [topology.coordinates(rank) for rank in range(topology.world_size)]
    assert len(set(coordinates)) == topology.world_size
    for rank, (dp, pp, tp) in enumerate(coordinates):
        assert topology.rank(dp=dp, pp=pp, tp=tp) == rank


@given(topologies)
def test_groups_of_each_axis_share_out_the_world(topology: Topology) -> None:
    world = set(range(topology.world_size))
    for axis, size in (("tp_group", topology.tp), ("dp_group", topology.dp), ("ep_group", topology.ep)):
        groups = {getattr(topology, axis)(rank) for rank in world}
        assert {rank for group in groups for rank in group} == world
        assert sum(map(len, groups)) == topology.world_size
        assert {len(group) for group in groups} == {size}
        for rank in world:
            assert rank in getattr(topology, axis)(rank)


@given(topologies)
def test_the_ep_rank_is_the_place_in_the_ep_group(topology: Topology) -> None:
    for rank in range(topology.world_size):
        assert topology.ep_group(rank)[topology.ep_rank(rank)] == rank


def test_ranks_of_one_engine_are_neighbours() -> None:
    topology = Topology(dp=2, tp=2)
    assert topology.tp_group(0) == (0, 1)
    assert topology.tp_group(3) == (2, 3)
    assert topology.dp_group(1) == (1, 3)
    assert topology.ep_group(0) == (0, 1, 2, 3)
    assert topology.describe(3) == "rank 3 (dp 1, tp 1)"
    assert Topology(pp=2).describe(1) == "rank 1 (dp 0, pp 1, tp 0)"


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_nodes_share_out_the_workers_of_an_engine_neighbours_together(pp: int, each: int, nodes: int) -> None:
    topology = Topology(dp=2, pp=pp, tp=each * nodes, nodes=nodes)
    shares = [topology.workers_of_node(node) for node in range(nodes)]
    assert [worker for share in shares for worker in share] == list(range(topology.num_workers))
    assert len({len(share) for share in shares}) == 1
    assert all(topology.node_of(worker) == node for node, share in enumerate(shares) for worker in share)


def test_a_rank_is_named_with_its_node_where_engines_are_spread() -> None:
    topology = Topology(pp=2, tp=2, nodes=2)
    assert topology.describe(3) == "rank 3 (dp 0, pp 1, tp 1, node 1)"
    assert topology.describe_worker(0, 2) == "worker dp 0 pp 1 tp 0 of node 1"
    with pytest.raises(ConfigError, match="4 workers cannot be shared out evenly among 3 nodes"):
        Topology(tp=4, nodes=3)


@pytest.mark.parametrize("axis", ["dp", "pp", "tp", "nodes"])
def test_an_empty_axis_is_refused(axis: str) -> None:
    with pytest.raises(ConfigError, match=f"axis {axis} must be at least 1, not 0"):
        Topology(**{axis: 0})


def test_ranks_outside_the_world_are_refused() -> None:
    topology = Topology(dp=2)
    with pytest.raises(ValueError, match=r"rank 2 is outside \[0, 2\)"):
        topology.coordinates(2)
    with pytest.raises(ValueError, match=r"dp rank -1 is outside \[0, 2\)"):
        topology.rank(dp=-1)


def test_divide_is_exact_or_an_error() -> None:
    assert divide(12, 4) == 3
    with pytest.raises(ValueError, match="13 is not divisible by 4"):
        divide(13, 4)


@given(st.integers(0, 200), st.integers(1, 12))
def test_split_range_gives_neighbours_of_almost_equal_size_larger_first(total: int, parts: int) -> None:
    pieces = [split_range(total, parts, index) for index in range(parts)]
    assert [item for piece in pieces for item in piece] == list(range(total))
    lengths = [len(piece) for piece in pieces]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 60), st.integers(1, 8))
def test_pipeline_stages_hold_neighbouring_layers_and_the_last_never_more_than_others(layers: int, stages: int) -> None:
    if layers < stages:
        with pytest.raises(ValueError, match="cannot be spread"):
            get_pp_indices(layers, 0, stages)
        return
    parts = [get_pp_indices(layers, stage, stages) for stage in range(stages)]
    assert parts[0][0] == 0
    assert parts[-1][1] == layers
    assert all(parts[i][1] == parts[i + 1][0] for i in range(stages - 1))
    counts = layers_per_stage(layers, stages)
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == min(counts)


def test_remainder_layers_go_to_the_middle_and_spare_the_first_stage_where_they_fit() -> None:
    assert layers_per_stage(6, 4) == [1, 2, 2, 1]
    assert layers_per_stage(5, 4) == [1, 1, 2, 1]
    assert layers_per_stage(7, 4) == [2, 2, 2, 1]
    assert layers_per_stage(9, 2) == [5, 4]


def test_a_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pipeline rank 4 is outside \[0, 4\)"):
        get_pp_indices(8, 4, 4)


@given(topologies)
def test_an_engines_workers_are_its_ranks_in_order(topology: Topology) -> None:
    ranks = [topology.worker_rank(dp, worker) for dp in range(topology.dp) for worker in range(topology.num_workers)]
    assert ranks == list(range(topology.world_size))
    for rank in ranks:
        dp, pp, tp = topology.coordinates(rank)
        assert topology.worker_index(rank) == pp * topology.tp + tp
        assert topology.worker_rank(dp, topology.worker_index(rank)) == rank


@given(topologies)
def test_the_worker_that_samples_is_the_first_tensor_rank_of_the_last_stage(topology: Topology) -> None:
    rank = topology.worker_rank(topology.dp - 1, topology.sampling_worker)
    assert topology.coordinates(rank) == (topology.dp - 1, topology.pp - 1, 0)


def test_a_worker_is_told_by_its_stage_only_where_there_are_several() -> None:
    assert Topology(dp=2, tp=2).describe_worker(1, 1) == "worker dp 1 tp 1"
    assert Topology(pp=2, tp=2).describe_worker(0, 3) == "worker dp 0 pp 1 tp 1"
    assert Topology(tp=2).describe_worker(0, 2) == "worker 2 of dp 0"


@pytest.mark.parametrize("worker", [-1, 4])
def test_a_worker_that_its_engine_does_not_have_is_refused(worker: int) -> None:
    with pytest.raises(ValueError, match=rf"worker {worker} is outside \[0, 4\)"):
        Topology(dp=2, pp=2, tp=2).worker_rank(0, worker)
