"""What one process of a world tells so that others find it, kept for those that come later. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moe_serve.base.messages import EngineAt, StoreAt
from moe_serve.base.topology import Topology
from moe_serve.world.members import Member
from moe_serve.world.parcels import Send


@dataclass(slots=True)
class Places:
    """The store is for engines; where the engine listens for workers, for launchers of its other nodes."""

    store: StoreAt | None = None
    engine: EngineAt | None = None

    def take(self, place: StoreAt | EngineAt, members: Mapping[int, Member], teller: int) -> list[Send]:
        """Keep it and pass it on to whom it is for."""
        if isinstance(place, StoreAt):
            self.store = place
        else:
            self.engine = place
        others = ((member, known) for member, known in members.items() if member != teller)
        return [Send(member, place) for member, known in others if _is_for(known, place)]

    def tell(self, member: int, newcomer: Member) -> list[Send]:
        """What is known already to somebody who has just come."""
        return [Send(member, place) for place in (self.store, self.engine) if place and _is_for(newcomer, place)]


def _is_for(known: Member, place: StoreAt | EngineAt) -> bool:
    return known.hello.role == "engine" if isinstance(place, StoreAt) else known.is_node


def absent_nodes(members: Iterable[Member], topology: Topology) -> str:
    """Nodes beside the engine's whose launchers have not come: `node 1 (workers 2, 3)`; "" where all have."""
    came = {known.hello.node_rank for known in members if known.is_node}
    return ", ".join(named_node(node, topology) for node in range(1, topology.nodes) if node not in came)


def named_node(node: int, topology: Topology) -> str:
    """`node 1 (workers 2, 3)`."""
    workers = topology.workers_of_node(node)
    return f"node {node} (worker{'s' if len(workers) > 1 else ''} {', '.join(map(str, workers))})"
