"""Options of one engine whose workers are spread over several nodes, and what does not go with them.

A section's part, not a section: ParallelConfig has these fields too. Engines that are each on one node are spread by
data_parallel_* instead.
"""

from __future__ import annotations

from pydantic import Field

from moe_serve.base.section import Host, Port, Section, Size, short

GOES_WITH_NODES = {"data_parallel_size", "data_parallel_master_port"}
"""Of data_parallel_*: the number of engines, which is 1, and what concerns node 0 alone."""


class NodesSection(Section):
    nnodes: Size = Field(1, json_schema_extra=short("n"))
    """Nodes (machines) that the tensor- and pipeline-parallel ranks of the one engine are spread over, as many on each;
    needs the mp executor. For several engines: the options data_parallel_*."""
    node_rank: int | None = Field(None, ge=0, json_schema_extra=short("r"))
    """Which of nnodes this is; node 0 has the server. Or, where all nodes have data_parallel_size_local ranks: says
    data_parallel_start_rank."""
    master_addr: Host | None = None
    """Address or name of node 0 of nnodes, where all of them meet; one that does not resolve yet is waited for."""
    master_port: Port = 29501
    """Port on node 0 at which nnodes meet; all other ports are negotiated there."""
    headless: bool = False
    """No HTTP server on this node: that of rank 0's node speaks for its ranks."""

    @property
    def is_spread(self) -> bool:
        """Whether an engine has workers on several nodes."""
        return self.nnodes > 1

    @property
    def is_beside(self) -> bool:
        """Whether this node has nothing but workers of the engine on node 0."""
        return self.is_spread and bool(self.node_rank)

    def check_nodes(self, num_engines: int, num_workers: int, executor: str | None) -> None:
        """ValueError for what cannot be, or would have no effect."""
        if not self.is_spread:
            if given := sorted({"master_addr", "master_port"} & self.model_fields_set):
                raise ValueError(
                    f"{' and '.join(given)} needs nnodes above 1: it is where the nodes of one engine meet (engines on "
                    "several machines meet at data_parallel_address)"
                )
            return
        if num_engines > 1:
            raise ValueError(
                f"nnodes ({self.nnodes}) spreads the ranks of one engine, and data_parallel_size ({num_engines}) asks "
                "for several; leave out nnodes and spread whole engines (data_parallel_size_local with "
                "data_parallel_start_rank, or data_parallel_rank, and data_parallel_address), or give "
                "data_parallel_size 1"
            )
        if others := sorted(self._of_engines()):
            raise ValueError(
                f"{' and '.join(others)} spreads engines over nodes, and does not go with nnodes ({self.nnodes}), "
                "which spreads the ranks of one; leave out the one or the other"
            )
        if executor not in (None, "mp"):
            raise ValueError(
                f"nnodes ({self.nnodes}) needs distributed_executor_backend mp, not {executor}; leave out one of them"
            )
        if num_workers % self.nnodes:
            raise ValueError(
                f"pipeline_parallel_size x tensor_parallel_size ({num_workers}) must be a multiple of nnodes "
                f"({self.nnodes}): as many ranks on each node"
            )
        self._check_place()

    def _check_place(self) -> None:
        """Which of the nodes this is, and where they meet."""
        if self.node_rank is None:
            raise ValueError(
                f"nnodes ({self.nnodes}) needs node_rank, from 0 to {self.nnodes - 1}: which node is this?"
            )
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank ({self.node_rank}) must lie in [0, {self.nnodes}), below nnodes")
        if not self.master_addr:
            raise ValueError(
                f"nnodes ({self.nnodes}) needs master_addr, the address or name of node 0, the same on all nodes"
            )
        if not self.master_port:
            raise ValueError("master_port (0) must be known to all nodes beforehand; give a free port of node 0")
        if self.headless and self.node_rank == 0:
            raise ValueError("headless is for a node beside node 0, which has the server; leave it out here")

    def _of_engines(self) -> list[str]:
        """Options that say which engines are where, and were given."""
        known = [name for name in type(self).model_fields if name.startswith("data_parallel_")]
        return [
            name
            for name in known
            if name not in GOES_WITH_NODES and getattr(self, name) != type(self).model_fields[name].default
        ]
