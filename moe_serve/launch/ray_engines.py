"""A launcher's engines as Ray actors, on the nodes of a cluster, in one placement group with a bundle for every rank.

An engine of one rank computes in its actor; the workers of a larger one are actors too, which it starts itself
(executor/ray.py), in its share of the bundles. An engine is on the node of its first bundle.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import ray
from ray._private.state import available_resources_per_node

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.registry import import_target
from moe_serve.base.site import local_address
from moe_serve.executor.ray_cluster import PLACE_SECONDS, ActorProcess, RayCluster, enter_actor, leave_actor
from moe_serve.executor.ray_placement import (
    Bundle,
    WorkerPlace,
    check_addresses,
    check_reach,
    choose_bundles,
    pinned,
    worker_share,
)
from moe_serve.executor.ray_settings import carried_environment
from moe_serve.launch.ray_spread import NodeRoom, spread_engines
from moe_serve.world.member import MemberSpec

LOOK_SECONDS = 0.5
LEAST_SECONDS = 5.0
"""For a group whose nodes were chosen late."""
ROUNDING = 1e-6
log = logging.getLogger(__name__)


class EngineActor:
    """An engine in a process that Ray started."""

    def work(self, told: bytes, environment: dict[str, str], neighbours: int) -> int:
        """An engine to its end; its exit code. The token comes as WorkerActor's does."""
        spec = MemberSpec.from_json(told)
        threads = enter_actor(environment, neighbours)
        # Its machine's own on the way to the coordinator: only here can that be known.
        site = msgspec.structs.replace(spec.site, address=local_address(spec.host, spec.port), threads=threads)
        run: Any = import_target("moe_serve.engine.process:run_engine", "engine", "process")
        return leave_actor(run(msgspec.structs.replace(spec, site=site)))


class ActorChild(ActorProcess):
    """An engine, as a launcher follows what it started."""

    def __init__(self, name: str, actor: Any, work: Any, address: str) -> None:
        super().__init__(actor, work, address)
        self.name = name

    @property
    def code(self) -> int | None:
        return self.poll()

    @property
    def fate(self) -> str:
        return f"{self.name} ({self.who}) {self.how}"

    def ask(self) -> None:
        """An actor can only be told by its coordinator; who has not come to it has nothing to bring to an end."""
        self.kill()


class RayEngines:
    """First prepare(), which blocks; close() in the end. `config` must be resolved."""

    def __init__(self, config: Config) -> None:
        self._config, self._parallel = config, config.parallel
        self._cluster = RayCluster(config.parallel, config.model.device)
        self._bundles: list[Bundle] = []

    def prepare(self) -> Config:
        """Connect to the cluster and find a place for every rank; the config that the engines must have.

        ConfigError if that cannot be; nothing is left then.
        """
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise
        indices = ",".join(str(bundle.index) for bundle in self._bundles)
        return self._config.with_("parallel", ray_placement_group=self._cluster.group_id, ray_bundle_indices=indices)

    def start(self, name: str, spec: MemberSpec) -> ActorChild:
        """The engine of `spec`, whose site is settled where it runs. Does not wait for it."""
        size, on_gpu = self._parallel.world_size, self._cluster.device == "GPU"
        first = spec.dp * size
        node = self._bundles[first].node
        neighbours = Counter(bundle.node for bundle in self._bundles)[node]
        shown_one = on_gpu and size == 1  # Ray shows an actor its own GPU and no other
        site = msgspec.structs.replace(
            spec.site,
            machine=self._cluster.addresses[node],
            ranks_here=1 if shown_one else neighbours,
            local_rank=0 if shown_one else sum(bundle.node == node for bundle in self._bundles[:first]),
        )
        actor = self._cluster.start_actor(EngineActor, self._bundles[first].index, computes=size == 1)
        told = msgspec.json.encode(msgspec.structs.replace(spec, site=site))
        environment = carried_environment(os.environ, self._parallel.ray_runtime_env)
        work = actor.work.remote(told, environment, neighbours)
        return ActorChild(name, actor, work, self._cluster.addresses[node])

    def close(self) -> None:
        """End what is left, and give back the group if it is ours. Safe to call twice."""
        self._cluster.close()

    def _prepare(self) -> None:
        cluster = self._cluster
        cluster.connect()
        self._bundles = self._given_bundles() if self._parallel.ray_placement_group else self._own_bundles()
        driver, addresses = cluster.driver, cluster.addresses
        check_addresses([driver, *(bundle.node for bundle in self._bundles)], addresses)
        check_reach(
            [WorkerPlace(each.index, each.node, addresses[each.node], neighbours=1) for each in self._bundles],
            at=self._parallel.data_parallel_address,
            driver=driver,
            driver_address=addresses[driver],
            what="engines",
            to="coordinator",
        )
        size = self._parallel.world_size
        for dp in range(self._parallel.data_parallel_size):
            own = self._bundles[dp * size : (dp + 1) * size]
            where = " and ".join(dict.fromkeys(addresses[bundle.node] for bundle in own))
            log.info("engine dp %d goes to %s, bundles %s", dp, where, ", ".join(str(bundle.index) for bundle in own))

    def _given_bundles(self) -> list[Bundle]:
        """Of the group that was given, in the order of the ranks: the operator's, or whole engines on a node first."""
        parallel = self._parallel
        chosen = choose_bundles(
            self._cluster.take_group(parallel.ray_placement_group or ""),
            self._cluster.device,
            parallel.world_size_across_dp,
            indices=parallel.ray_bundle_indices or "",
        )
        if parallel.ray_bundle_indices:
            return chosen
        rooms = Counter(bundle.node for bundle in chosen)
        left = {node: iter([bundle for bundle in chosen if bundle.node == node]) for node in rooms}
        return [next(left[node]) for node in self._spread([self._room(*each) for each in rooms.items()])]

    def _own_bundles(self) -> list[Bundle]:
        """A group of our own, each bundle pinned to the node that was chosen for it."""
        addresses = self._cluster.addresses
        check_addresses(list(addresses), addresses)  # a pin is an address
        share = {str(self._cluster.device): worker_share(self._cluster.device)}
        deadline = time.monotonic() + PLACE_SECONDS
        nodes = self._choose_nodes(deadline)
        seconds = max(LEAST_SECONDS, deadline - time.monotonic())
        made = self._cluster.make_group([share | pinned(addresses[node]) for node in nodes], seconds)
        if made is None:
            where = ", ".join(f"{addresses[node]} for {count}" for node, count in Counter(nodes).items())
            raise ConfigError(
                f"the Ray cluster did not place {len(nodes)} ranks ({where}) within {seconds:.0f} s; make the "
                "placement group beforehand (--ray-placement-group), or start fewer ranks (--data-parallel-size)"
            )
        return made

    def _choose_nodes(self, deadline: float) -> list[str]:
        """By what is free; where that is too little, but what there is would do, it may become free."""
        while True:
            try:
                return self._spread(self._rooms(available_resources_per_node()))
            except ConfigError:
                self._spread(self._rooms({node["NodeID"]: node["Resources"] for node in ray.nodes()}))
                if time.monotonic() > deadline:
                    raise
            time.sleep(LOOK_SECONDS)

    def _rooms(self, resources: Any) -> list[NodeRoom]:
        """Of the nodes that live, with so many of their resources by name."""
        device = self._cluster.device
        amounts = {node: resources.get(node, {}).get(device, 0.0) for node in self._cluster.addresses}
        return [self._room(node, int(each / worker_share(device) + ROUNDING)) for node, each in amounts.items()]

    def _room(self, node: str, workers: int) -> NodeRoom:
        return NodeRoom(node, self._cluster.addresses[node], workers)

    def _spread(self, rooms: Sequence[NodeRoom]) -> list[str]:
        parallel = self._parallel
        return spread_engines(
            rooms,
            engines=parallel.data_parallel_size,
            size=parallel.world_size,
            driver=self._cluster.driver,
            local=parallel.data_parallel_size_local,
        )
