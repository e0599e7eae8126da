"""Which expert-parallel ranks share a node: the sizes of the nodes, since neighbours do. numpy only.

N nodes, R ranks. A node is a run of neighbouring ranks that one launcher, or one supervisor of launchers, started:
between them bytes stay on a machine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate, groupby

import numpy as np

from moe_serve.base.errors import ConfigError
from moe_serve.base.topology import Topology, split_range
from moe_serve.eplb.placement import Ints

NodeSizes = tuple[int, ...]
"""Ranks of each node, in order of rank; () for one node with all of them."""


def even_nodes(num_ranks: int, num_nodes: int) -> NodeSizes:
    """As alike as they can be, larger nodes first. ConfigError for more nodes than ranks, or none."""
    if not 1 <= num_nodes <= num_ranks:
        raise ConfigError(f"the number of nodes must lie in [1, {num_ranks}] for {num_ranks} ranks, not {num_nodes}")
    return tuple(len(split_range(num_ranks, num_nodes, node)) for node in range(num_nodes))


def nodes_of_engines(names: Iterable[str], ranks_per_engine: int) -> NodeSizes:
    """From the name of each engine's node, in order of DP rank; an engine's ranks are on one node."""
    return tuple(len(list(run)) * ranks_per_engine for _, run in groupby(names))


def nodes_of_workers(topology: Topology) -> NodeSizes:
    """Of the one engine whose workers are spread over nodes: tensor ranks that share a node in each stage."""
    stages = range(0, topology.num_workers, topology.tp)
    names = (tuple(topology.node_of(first + tp) for first in stages) for tp in range(topology.tp))
    return tuple(len(list(run)) for _, run in groupby(names))


def nodes_of_ranks(node_sizes: NodeSizes) -> Ints:
    """int64 (R,): the node of each rank."""
    return np.repeat(np.arange(len(node_sizes), dtype=np.int64), node_sizes)


def node_of_rank(node_sizes: NodeSizes, rank: int) -> int:
    """The node of one rank."""
    return bisect_right(list(accumulate(node_sizes)), rank)
