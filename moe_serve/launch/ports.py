"""The ports that a node listens at and that somebody outside must know, or that options choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.launched import EXTERNAL_LAUNCHER
from moe_serve.launch.meeting_place import MeetingPlace

ANY_FREE = 0
EVERY_ADDRESS = ("0.0.0.0", "::", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class PortPlan:
    """Where something listens: `port` 0 is any free one. `option` chooses it."""

    what: str
    host: str
    port: int
    option: str


def ports_of_node(config: Config, dp_ranks: Sequence[int]) -> list[PortPlan]:
    """Of the node that starts these ranks."""
    if config.parallel.distributed_executor_backend == EXTERNAL_LAUNCHER:
        return []  # torchrun's affair
    parallel, server, found = config.parallel, config.server, []
    if 0 in dp_ranks:
        place, store = MeetingPlace.of(parallel), parallel.data_parallel_master_port
        found += [
            PortPlan(what="coordinator", host=place.host, port=place.port, option=place.port_option),
            PortPlan(what="store of rank 0", host=place.host, port=store, option="--data-parallel-master-port"),
        ]
    if parallel.data_parallel_multi_port_external_lb:
        return [*found, *ports_of_ranks(config, dp_ranks).values(), port_of_supervisor(config)]
    if 0 in dp_ranks or parallel.load_balancing != "internal":
        found.append(PortPlan(what="HTTP", host=server.host, port=server.port, option="--port"))
    return found


def ports_of_ranks(config: Config, dp_ranks: Sequence[int]) -> dict[int, PortPlan]:
    """Where each rank's own HTTP server listens, if a supervisor starts them: one after the other."""
    server = config.server
    return {
        rank: PortPlan(what=f"HTTP of rank {rank}", host=server.host, port=server.port + place, option="--port")
        for place, rank in enumerate(dp_ranks)
    }


def port_of_supervisor(config: Config) -> PortPlan:
    port = config.parallel.data_parallel_supervisor_port
    return PortPlan(what="supervisor", host=config.server.host, port=port, option="--data-parallel-supervisor-port")


def check_ports(ports: Sequence[PortPlan]) -> None:
    """ConfigError if two would listen at one port of one address."""
    for index, one in enumerate(ports):
        for other in ports[:index]:
            meet = one.host == other.host or {one.host, other.host} & set(EVERY_ADDRESS)
            if one.port == other.port != ANY_FREE and meet:
                raise ConfigError(
                    f"{other.what} ({other.option}) and {one.what} ({one.option}) would both listen at port "
                    f"{one.port} of {one.host}; give one of them another"
                )
