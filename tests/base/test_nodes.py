"""One engine over several nodes: which options it needs, and what does not go with it."""

from __future__ import annotations

import pytest

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError

TWO: dict[str, object] = {"nnodes": 2, "node_rank": 0, "master_addr": "host", "tensor_parallel_size": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"node_rank": None}, r"nnodes \(2\) needs node_rank, from 0 to 1: which node is this\?"),
        ({"node_rank": 2}, r"node_rank \(2\) must lie in \[0, 2\), below nnodes"),
        ({"master_addr": None}, r"nnodes \(2\) needs master_addr, the address or name of node 0"),
        ({"master_addr": ""}, r"nnodes \(2\) needs master_addr"),
        ({"master_port": 0}, r"master_port \(0\) must be known to all nodes beforehand"),
        ({"nnodes": 3}, r"tensor_parallel_size \(4\) must be a multiple of nnodes \(3\)"),
        ({"tensor_parallel_size": 1}, r"tensor_parallel_size \(1\) must be a multiple of nnodes \(2\)"),
        ({"headless": True}, "headless is for a node beside node 0"),
        ({"distributed_executor_backend": "ray"}, r"nnodes \(2\) needs distributed_executor_backend mp, not ray"),
        ({"distributed_executor_backend": "a.b:C"}, "mp, not a.b:C"),
        ({"data_parallel_size": 2}, r"data_parallel_size \(2\) asks for several; .*data_parallel_size_local with"),
        ({"data_parallel_size_local": 1}, r"data_parallel_size_local spreads engines over nodes.*nnodes \(2\)"),
        ({"data_parallel_address": "host"}, "data_parallel_address spreads engines"),
        ({"data_parallel_rank": 0}, "data_parallel_rank spreads engines"),
        ({"node_rank": 1, "api_server_count": 2}, r"api_server_count \(2\) does not go with node_rank \(1\)"),
        ({"nnodes": 1, "node_rank": None}, "master_addr needs nnodes above 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_flat({name: value for name, value in (TWO | changes).items() if value is not None})


def test_node_0_has_the_engine_and_the_others_have_workers_of_it() -> None:
    head = Config.from_flat({**TWO, "master_port": 7}).parallel
    assert (head.dp_ranks_here, head.is_spread, head.is_beside, head.is_apart) == ((0,), True, False, True)
    beside = Config.from_flat({**TWO, "node_rank": 1, "headless": True, "master_port": 7}).parallel
    assert (beside.dp_ranks_here, beside.is_spread, beside.is_beside, beside.is_apart) == ((), True, True, True)
    for each in (head, beside):
        assert (each.coordinator_host, each.coordinator_port) == ("host", 7)
        assert [list(each.topology.workers_of_node(node)) for node in range(2)] == [[0, 1], [2, 3]]
        each.check_built()


def test_nodes_must_agree_on_their_number_and_not_on_which_they_are() -> None:
    same = Config.from_flat(TWO).agreement()
    assert Config.from_flat({**TWO, "node_rank": 1, "master_port": 9}).agreement() == same
    assert Config.from_flat({**TWO, "nnodes": 4}).agreement() != same
