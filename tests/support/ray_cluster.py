"""A real Ray of several nodes on loopback addresses of this machine, and what is left of engines in it."""

from __future__ import annotations

import os
import secrets
import time
from typing import Any, Self

import psutil
import ray
from ray._raylet import Config
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

GONE_SECONDS = 15.0
TOKEN = secrets.token_hex(16)
ACTORS = ("ray::WorkerActor", "ray::EngineActor")
NODES = ("127.0.0.2", "127.0.0.3")


class RayNodes:
    """Two nodes of one CPU each; this process is connected to the first. `address` for --ray-address."""

    def __init__(self) -> None:
        # Ray listens on all addresses; who does not know the token is not heard. Whatever the tests start inherits it.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, RAY_USAGE_STATS_ENABLED="0")
        Config.initialize("")  # Ray has read the environment when it was imported
        self.cluster = Cluster(shutdown_at_exit=True)
        for address in NODES:
            self.add(address)
        self.address = str(self.cluster.address)

    def add(self, address: str) -> Any:
        """A node more, at an address that others may have."""
        return self.cluster.add_node(
            node_ip_address=address, num_cpus=1, object_store_memory=80 << 20, include_dashboard=False
        )

    def __enter__(self) -> Self:
        ray.init(address=self.address, log_to_driver=False)
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()
        self.cluster.shutdown()


def worker_processes() -> list[psutil.Process]:
    """Processes of Ray that hold one of our actors."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(ACTORS):
                found.append(process)
        except psutil.Error:
            continue
    return found


def groups_that_stand() -> set[str]:
    """Ids of placement groups that were not removed."""
    return {name for name, told in placement_group_table().items() if told["state"] != "REMOVED"}


def wait_clean(groups: set[str]) -> None:
    """AssertionError unless soon no worker lives and no placement groups stand but these."""
    deadline = time.monotonic() + GONE_SECONDS
    while time.monotonic() < deadline and (worker_processes() or groups_that_stand() != groups):
        time.sleep(0.05)
    assert not worker_processes()
    assert groups_that_stand() == groups
