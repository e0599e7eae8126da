"""The sites of the processes that one launcher starts."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.base.site import Site
from moe_serve.launch.part import NodePart
from moe_serve.world.member import threads_per_rank


def name_of_this_node() -> str:
    """No two launchers share it, also on one machine."""
    return f"{socket.gethostname()}-{os.getpid()}"


def make_site(
    parallel: ParallelConfig,
    dp_ranks: Sequence[int],
    *,
    address: str,
    dp: int | None = None,
    part: NodePart = NodePart(),  # noqa: B008 - frozen
) -> Site:
    """For the engine of `dp`, or without one for a process that computes nothing, or a worker of an engine on another
    node. `dp_ranks` are this launcher's."""
    workers = parallel.topology.workers_of_node(part.node_rank)
    engines = 1 if part.node_rank else len(dp_ranks)
    ranks_here = max(1, engines * len(workers) * part.launchers)
    place = 0 if dp is None else dp_ranks.index(dp)
    if parallel.data_parallel_rank_local is not None:  # of one rank that shares its machine with other launchers'
        place = parallel.data_parallel_rank_local
    return Site(
        address=address,
        node=name_of_this_node(),
        machine=part.machine,
        ranks_here=ranks_here,
        local_rank=place * len(workers),
        first_worker=workers.start,
        threads=threads_per_rank(ranks_here),
    )
