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
    """For the engine of `dp`, or without one for a process that computes nothing. `dp_ranks` are this launcher's."""
    ranks_here = max(1, len(dp_ranks) * parallel.world_size * part.launchers)
    place = 0 if dp is None else dp_ranks.index(dp)
    if parallel.data_parallel_rank_local is not None:  # of one rank that shares its machine with other launchers'
        place = parallel.data_parallel_rank_local
    return Site(
        address=address,
        node=name_of_this_node(),
        machine=part.machine,
        ranks_here=ranks_here,
        local_rank=place * parallel.world_size,
        threads=threads_per_rank(ranks_here),
    )
