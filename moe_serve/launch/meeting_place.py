"""Where the launchers of one world meet, and in which words people are told of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.base.site import with_port


@dataclass(frozen=True, slots=True, kw_only=True)
class MeetingPlace:
    """`first` is whose launcher holds the coordinator there. `once` says which options tell launchers apart."""

    host: str
    port: int
    first: str
    host_option: str
    port_option: str
    once: str

    @classmethod
    def of(cls, parallel: ParallelConfig) -> MeetingPlace:
        host, port = parallel.coordinator_host, parallel.coordinator_port
        if parallel.is_spread:
            return cls(
                host=host,
                port=port,
                first="node 0",
                host_option="--master-addr",
                port_option="--master-port",
                once="option --node-rank: each node is started once",
            )
        return cls(
            host=host,
            port=port,
            first="rank 0",
            host_option="--data-parallel-address",
            port_option="--data-parallel-rpc-port",
            once="options --data-parallel-rank and --data-parallel-start-rank: each rank is started once",
        )

    @property
    def where(self) -> str:
        return with_port(self.host, self.port)

    @property
    def options(self) -> str:
        return f"options {self.host_option} and {self.port_option}"
