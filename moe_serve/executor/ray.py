"""One Ray actor per worker, inside a placement group: the one that surrounds this program, or one of the engine's own.

The engine also sees an actor's closed connection, as with every worker.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import msgspec
import ray

from moe_serve.base.commands import Meeting, WorkerFacts
from moe_serve.base.config import Config
from moe_serve.base.progress import Phase, Progress
from moe_serve.base.registry import import_target
from moe_serve.executor.ray_cluster import PLACE_SECONDS, ActorProcess, RayCluster, enter_actor, leave_actor
from moe_serve.executor.ray_placement import (
    Bundle,
    WorkerPlace,
    check_addresses,
    check_reach,
    check_room,
    choose_bundles,
    new_bundles,
    no_room,
    place_workers,
)
from moe_serve.executor.ray_settings import carried_environment
from moe_serve.executor.remote import RemoteExecutor
from moe_serve.worker.wire import Invitation

NEAR_SECONDS = 5.0
"""For a placement group that begins on this node, before any other will do."""
log = logging.getLogger(__name__)


class RayExecutor(RemoteExecutor):
    """Workers on the nodes of a Ray cluster. ConfigError where it has no room for them."""

    def __init__(self, config: Config, meeting: Meeting, progress: Progress) -> None:
        self._actors = RayActors(config, meeting)
        super().__init__(config, meeting, progress, self._actors)

    def start(self) -> WorkerFacts:
        self._progress.enter(Phase.START_WORKERS)
        self._actors.prepare()
        return super().start()

    def close(self) -> None:
        super().close()
        self._actors.close()


class WorkerActor:
    """A worker in a process that Ray started."""

    def work(self, told: bytes, environment: dict[str, str], neighbours: int) -> int:
        """A worker to its end; its exit code. An argument of a method goes from process to process, not into Ray's
        own records, so the token comes this way."""
        invitation = msgspec.json.decode(told, type=Invitation)
        threads = enter_actor(environment, neighbours)
        if (site := invitation.site) is not None:
            site = msgspec.structs.replace(site, threads=threads)
        run: Any = import_target("moe_serve.worker.process:run_worker", "worker", "process")
        return leave_actor(run(msgspec.structs.replace(invitation, threads=threads, site=site)))


class ActorWorker(ActorProcess):
    """A worker that is an actor. A worker that meets with another's death ends itself, and Ray calls that a crash."""

    knows_signals = False

    def fate(self) -> str:
        return self.how

    def is_stopped(self) -> bool:
        return False


class RayActors:
    """A Starter. First prepare(); close() in the end."""

    def __init__(self, config: Config, meeting: Meeting) -> None:
        self._parallel = config.parallel
        self._meeting = meeting
        self._cluster = RayCluster(config.parallel, config.model.device)
        self._places: list[WorkerPlace] = []

    def prepare(self) -> None:
        """Connect to the cluster and find a place for every worker. ConfigError if that cannot be."""
        cluster = self._cluster
        cluster.connect()
        bundles = self._given_bundles() if self._parallel.ray_placement_group else self._own_bundles()
        driver, addresses = cluster.driver, cluster.addresses
        check_addresses([driver, *(bundle.node for bundle in bundles)], addresses)
        self._places = place_workers(bundles, addresses, driver=driver)
        check_reach(self._places, at=self._meeting.site.address, driver=driver, driver_address=addresses[driver])
        for worker, place in enumerate(self._places):
            log.info("worker %d goes to bundle %d on %s", worker, place.bundle, place.address)

    def start(self, worker: int, invitation: Invitation) -> ActorWorker:
        place = self._places[worker]
        on_gpu = self._cluster.device == "GPU"
        actor = self._cluster.start_actor(WorkerActor, place.bundle, computes=True)
        neighbours = place.neighbours * self._engines_here
        # Ray shows an actor its own GPU and no other.
        site = msgspec.structs.replace(self._meeting.site, ranks_here=1 if on_gpu else neighbours)
        told = msgspec.json.encode(msgspec.structs.replace(invitation, site=site))
        environment = carried_environment(os.environ, self._parallel.ray_runtime_env)
        return ActorWorker(actor, actor.work.remote(told, environment, neighbours), place.address)

    def close(self) -> None:
        """End what is left, and give back the group if it is ours. Safe to call twice."""
        self._cluster.close()

    @property
    def _engines_here(self) -> int:
        """Of this engine's node; each may have as many workers on a node as this one has."""
        return max(1, self._meeting.site.ranks_here // self._parallel.world_size)

    def _given_bundles(self) -> list[Bundle]:
        """This engine's share of the bundles of the group that was given."""
        bundles = self._cluster.take_group(self._parallel.ray_placement_group or "")
        size, first = self._parallel.world_size, self._meeting.dp_rank * self._parallel.world_size
        chosen = choose_bundles(
            bundles,
            self._cluster.device,
            self._parallel.world_size_across_dp,
            indices=self._parallel.ray_bundle_indices or "",
        )
        return chosen[first : first + size]

    def _own_bundles(self) -> list[Bundle]:
        """A group of the engine's own, on this node first if that has the device."""
        count, cluster = self._parallel.world_size, self._cluster
        total, free = (told.get(cluster.device, 0.0) for told in (ray.cluster_resources(), ray.available_resources()))
        check_room(cluster.device, count, total=total, free=free)
        here = next(node for node in ray.nodes() if node["NodeID"] == cluster.driver)
        tries = [("", PLACE_SECONDS)]
        if here["Resources"].get(cluster.device, 0):
            tries.insert(0, (cluster.addresses[cluster.driver], NEAR_SECONDS))
        for first_on, seconds in tries:
            made = cluster.make_group(new_bundles(cluster.device, count, first_on=first_on), seconds)
            if made is not None:
                return made
        waited = sum(seconds for _, seconds in tries)
        raise no_room(cluster.device, count, total=total, free=free, waited=waited)
