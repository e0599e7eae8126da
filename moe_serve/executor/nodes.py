"""Workers of one engine on several nodes: children of the engine on its own, started by launchers on the others."""

from __future__ import annotations

from collections.abc import Callable

from moe_serve.base.topology import Topology
from moe_serve.executor.starting import Started, StartedElsewhere
from moe_serve.executor.subprocesses import Subprocesses
from moe_serve.worker.wire import Invitation


class NodeWorkers:
    """A Starter, on node 0. `announce(address)` lets the launchers of the other nodes know where the engine listens."""

    def __init__(self, topology: Topology, announce: Callable[[str], None]) -> None:
        self._topology = topology
        self._announce = announce
        self._here = Subprocesses()
        self._announced = False

    def start(self, worker: int, invitation: Invitation) -> Started:
        if not self._announced:
            self._announced = True
            self._announce(invitation.address)
        node = self._topology.node_of(worker)
        return self._here.start(worker, invitation) if node == 0 else StartedElsewhere(f"not come from node {node}")
