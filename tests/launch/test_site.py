"""Sites: each process of a node has its place, and the node's ranks share the machine."""

from __future__ import annotations

import os

import pytest

from moe_serve.base.errors import ConfigError
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.base.site import local_address
from moe_serve.launch.part import NodePart, node_part
from moe_serve.launch.site import make_site, name_of_this_node
from moe_serve.world.member import threads_per_rank


def test_ranks_of_a_node_are_counted_there_and_begin_at_zero_whatever_their_dp_rank() -> None:
    parallel = ParallelConfig(data_parallel_size=6, tensor_parallel_size=2)
    sites = [make_site(parallel, (4, 5), address="10.0.0.2", dp=dp) for dp in (4, 5)]
    assert [site.local_rank for site in sites] == [0, 2]
    assert {(site.ranks_here, site.threads, site.address) for site in sites} == {(4, threads_per_rank(4), "10.0.0.2")}
    assert {site.node for site in sites} == {name_of_this_node()}
    assert str(os.getpid()) in name_of_this_node()


def test_ranks_that_a_supervisor_started_share_the_machine_each_in_its_place() -> None:
    parallel = ParallelConfig(
        data_parallel_size=4, tensor_parallel_size=2, data_parallel_rank=3, data_parallel_rank_local=1
    )
    part = NodePart(dp_ranks=(3,), machine="here", launchers=2)
    site = make_site(parallel, (3,), address="127.0.0.1", dp=3, part=part)
    assert (site.local_rank, site.ranks_here, site.threads) == (2, 4, threads_per_rank(4))
    assert site.machine == "here"


def test_workers_of_an_engine_on_another_node_begin_at_zero_there_whatever_their_index() -> None:
    options = {"nnodes": 2, "master_addr": "host0", "pipeline_parallel_size": 2, "tensor_parallel_size": 2}
    sites = []
    for node_rank in (0, 1):
        parallel = ParallelConfig(node_rank=node_rank, **options)  # type: ignore[arg-type]
        part = node_part(parallel)
        assert (part.joins, part.serve_http, part.node_rank) == (node_rank == 1, node_rank == 0, node_rank)
        dp = 0 if part.dp_ranks else None
        sites.append(make_site(parallel, part.dp_ranks or (), address="10.0.0.2", dp=dp, part=part))
    assert [(site.local_rank, site.first_worker) for site in sites] == [(0, 0), (0, 2)]
    assert {(site.ranks_here, site.threads) for site in sites} == {(2, threads_per_rank(2))}


def test_a_node_without_ranks_has_all_cores_for_its_front_end() -> None:
    site = make_site(ParallelConfig(), (), address="127.0.0.1")
    assert (site.local_rank, site.threads) == (0, threads_per_rank(1))


def test_the_own_address_is_on_the_way_to_the_other() -> None:
    assert local_address("localhost", 0) == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"host 'no\.such\.host\.invalid' cannot be resolved"):
        local_address("no.such.host.invalid", 1)
