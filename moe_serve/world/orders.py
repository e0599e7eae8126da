"""What the fleet passes on to many: that the world is ready, and what load balancing decides for engines. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from moe_serve.base.messages import Hello, Refused, WorldReady
from moe_serve.base.topology import Topology
from moe_serve.eplb.nodes import nodes_of_engines, nodes_of_workers
from moe_serve.eplb.questions import Question, SharesQuestion
from moe_serve.eplb.rearrangement import ForEngine
from moe_serve.eplb.rebalancer import Rebalancer
from moe_serve.world.members import Member, front_doors
from moe_serve.world.parcels import Send


def tell_ready(members: Mapping[int, Member]) -> list[Send]:
    """To each where the API server of its node listens; those of a node are told by one record."""
    told = {node: WorldReady(front_door=door) for node, door in front_doors(members.values()).items()}
    nowhere = WorldReady()
    return [Send(member, told.get(known.hello.node, nowhere)) for member, known in members.items()]


def refuse(member: int, hello: Hello, refused: Refused, log: list[str]) -> list[Send]:
    """To somebody who does not belong here. A launcher's end is on another machine: who looks here for the reason why
    it has not come, and will not, finds it in the `log`."""
    if hello.role == "launcher" and not refused.patience_seconds:
        log.append(f"refused: {refused.reason}")
    return [Send(member, refused, close=True)]


def to_engines(members: Mapping[int, Member], orders: Sequence[ForEngine]) -> list[Send]:
    """Each order to its engine; engines that are gone get none."""
    if not orders:
        return []  # as after most news, of which every engine has some
    engines = {known.hello.dp: member for member, known in members.items() if known.hello.role == "engine"}
    return [Send(engines[each.dp], each.order) for each in orders if each.dp in engines]


def tell_nodes(rebalancer: Rebalancer | None, members: Iterable[Member], topology: Topology) -> None:
    """Which engines share a node: those that one launcher, or one supervisor of launchers, started; or which workers
    of one engine that is spread over nodes. Once all engines are there."""
    if rebalancer is not None and topology.nodes > 1:
        rebalancer.set_nodes(nodes_of_workers(topology))
    elif rebalancer is not None:
        hellos = sorted((known.hello for known in members if known.hello.role == "engine"), key=lambda each: each.dp)
        rebalancer.set_nodes(nodes_of_engines([each.machine or each.node for each in hellos], topology.tp))


def dated(question: Question, generation: int) -> Question:
    """Shares are for the ranks of one generation."""
    return (
        msgspec.structs.replace(question, generation=generation) if isinstance(question, SharesQuestion) else question
    )
