"""A machine whose every device has two RDMA devices of its own; what has no device has the index None."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TopologyGroup:
    cuda_device: int | None
    domains: list[str]


class TransferEngine:
    @staticmethod
    def detect_topology() -> list[TopologyGroup]:
        return [TopologyGroup(device, ["rdma0", "rdma1"]) for device in (None, 0, 1)]
