"""One Ray actor per worker, inside a placement group: the one that surrounds this program, or one of the engine's own.

An actor's process is the worker's, so whatever ends the one ends the other: a kill, the end of the engine (Ray's
driver), the removal of the group. The engine also sees its closed connection, as with every worker.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from typing import Any

import msgspec
import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    PlacementGroupID,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moe_serve.base.commands import Meeting, WorkerFacts
from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.progress import Phase, Progress
from moe_serve.base.registry import import_target
from moe_serve.executor.ray_placement import (
    Bundle,
    Device,
    WorkerPlace,
    check_addresses,
    check_reach,
    check_room,
    choose_bundles,
    new_bundles,
    place_workers,
)
from moe_serve.executor.ray_settings import carried_environment, import_path
from moe_serve.executor.remote import RemoteExecutor
from moe_serve.executor.starting import describe_code
from moe_serve.worker.wire import Invitation
from moe_serve.world.member import thread_environment, threads_per_rank

CONNECT_SECONDS = 5.0
NEAR_SECONDS = 5.0
"""For a placement group that begins on this node, before any other will do."""
PLACE_SECONDS = 30.0
GONE_SECONDS = 3.0
FAREWELL_SECONDS = 1.0
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
    """Runs in a process that Ray started, which has loaded neither torch nor anything else of ours yet."""

    def work(self, told: bytes, environment: dict[str, str], neighbours: int) -> int:
        """A worker to its end; its exit code. An argument of a method goes from process to process, not into Ray's
        own records, so the token comes this way; torch reads `environment` when it is imported."""
        invitation = msgspec.json.decode(told, type=Invitation)
        threads = threads_per_rank(neighbours)
        os.environ.update(environment | thread_environment(threads))
        if (site := invitation.site) is not None:
            site = msgspec.structs.replace(site, threads=threads)
        run: Any = import_target("moe_serve.worker.process:run_worker", "worker", "process")
        code = run(msgspec.structs.replace(invitation, threads=threads, site=site))
        # Threads of torch and of the link must not keep a failed worker, once its code has been told.
        threading.Timer(FAREWELL_SECONDS, os._exit, [code]).start()
        return int(code)


class ActorWorker:
    """A worker that is an actor. A worker that meets with another's death ends itself, and Ray calls that a crash."""

    knows_signals = False

    def __init__(self, actor: Any, work: Any, place: WorkerPlace) -> None:
        self._actor = actor
        self._work = work
        self._place = place
        self._lock = threading.Lock()
        self._end: tuple[int, str] | None = None

    @property
    def who(self) -> str:
        return f"Ray actor {self._actor._actor_id.hex()[:8]} on {self._place.address}"

    def poll(self) -> int | None:
        """Ray does not say which signal ended a process, nor whether it crashed: one code for all of that."""
        with self._lock:
            if self._end is None:
                self._end = self._look()
            return None if self._end is None else self._end[0]

    def fate(self) -> str:
        return "is gone" if self._end is None else self._end[1]

    def kill(self) -> None:
        ray.kill(self._actor)
        deadline = time.monotonic() + GONE_SECONDS
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def is_stopped(self) -> bool:
        return False

    def _look(self) -> tuple[int, str] | None:
        done, _ = ray.wait([self._work], timeout=0)
        if not done:
            return None
        try:
            code = int(ray.get(done[0]))
            return code, describe_code(code)
        except RayActorError as error:
            return -signal.SIGKILL, f"was killed or crashed (Ray: {_reason(error)})"
        except RayError as error:
            return 1, f"failed (Ray: {_reason(error)})"


class RayActors:
    """A Starter. First prepare(); close() in the end."""

    def __init__(self, config: Config, meeting: Meeting) -> None:
        self._parallel = config.parallel
        self._asked_device = config.model.device
        self._meeting = meeting
        self._device: Device = "CPU"
        self._connected_here = False
        self._group: Any = None
        self._owns_group = False
        self._places: list[WorkerPlace] = []
        self._actors: list[Any] = []

    def prepare(self) -> None:
        """Connect to the cluster and find a place for every worker. ConfigError if that cannot be."""
        self._connect()
        self._device = self._choose_device()
        driver = ray.get_runtime_context().get_node_id()
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        bundles = self._given_bundles() if self._parallel.ray_placement_group else self._own_bundles(driver, addresses)
        check_addresses([driver, *(bundle.node for bundle in bundles)], addresses)
        self._places = place_workers(bundles, addresses, driver=driver)
        check_reach(self._places, engine=self._meeting.site.address, driver=driver, driver_address=addresses[driver])
        for worker, place in enumerate(self._places):
            log.info("worker %d goes to bundle %d on %s", worker, place.bundle, place.address)

    def start(self, worker: int, invitation: Invitation) -> ActorWorker:
        place = self._places[worker]
        on_gpu = self._device == "GPU"
        actor = (
            ray.remote(WorkerActor)
            .options(
                num_cpus=0,  # the bundle is the worker's, and its share of a core
                num_gpus=1 if on_gpu else 0,
                max_restarts=0,
                runtime_env={"env_vars": import_path()},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=place.bundle
                ),
            )
            .remote()
        )
        self._actors.append(actor)
        neighbours = place.neighbours * self._engines_here
        # Ray shows an actor its own GPU and no other.
        site = msgspec.structs.replace(self._meeting.site, ranks_here=1 if on_gpu else neighbours)
        told = msgspec.json.encode(msgspec.structs.replace(invitation, site=site))
        return ActorWorker(actor, actor.work.remote(told, carried_environment(os.environ), neighbours), place)

    def close(self) -> None:
        """End what is left, and give back the group if it is ours. Safe to call twice."""
        actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor)
        if self._owns_group:
            self._owns_group = False
            remove_placement_group(self._group)
        if self._connected_here:
            self._connected_here = False
            ray.shutdown()

    @property
    def _engines_here(self) -> int:
        """Of this launcher; each may have as many workers on a node as this one has."""
        return max(1, self._meeting.site.ranks_here // self._parallel.world_size)

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        address = self._parallel.ray_address or os.environ.get("RAY_ADDRESS", "")
        where = f"no Ray cluster answers at {address}" if address else "no Ray cluster runs on this machine"
        try:
            if address:
                host, _, port = address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
            ray.init(address=address or "auto", logging_level=logging.WARNING)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{where} ({_first_line(error)}); start one (ray start --head), or give HOST:PORT of one "
                "(--ray-address or RAY_ADDRESS)"
            ) from error
        self._connected_here = True

    def _choose_device(self) -> Device:
        if self._asked_device == "auto":
            return "GPU" if ray.cluster_resources().get("GPU", 0) else "CPU"
        return "GPU" if self._asked_device == "cuda" else "CPU"

    def _given_bundles(self) -> list[Bundle]:
        """This engine's share of the bundles of the group that was given."""
        bundles = self._take_group(self._parallel.ray_placement_group or "")
        size, first = self._parallel.world_size, self._meeting.dp_rank * self._parallel.world_size
        chosen = choose_bundles(
            bundles,
            self._device,
            self._parallel.world_size_across_dp,
            indices=self._parallel.ray_bundle_indices or "",
        )
        return chosen[first : first + size]

    def _take_group(self, told: str) -> list[Bundle]:
        try:
            self._group = PlacementGroup(PlacementGroupID(bytes.fromhex(told)))
            known = placement_group_table(self._group).get("state", "REMOVED") != "REMOVED"
        except ValueError:
            known = False
        if not known:
            raise ConfigError(
                f"the Ray cluster has no placement group {told!r}; give the id of one that is there "
                "(--ray-placement-group), or none"
            )
        if not self._group.wait(PLACE_SECONDS):
            raise ConfigError(
                f"the Ray placement group {told} was not placed within {PLACE_SECONDS:g} s; wait until it is, or make "
                "a smaller one (--ray-placement-group)"
            )
        return _bundles_of(self._group)

    def _own_bundles(self, driver: str, addresses: dict[str, str]) -> list[Bundle]:
        """A group of the engine's own, on this node first if that has the device."""
        count = self._parallel.world_size
        self._check_room(count)
        here = next(node for node in ray.nodes() if node["NodeID"] == driver)
        tries = [("", PLACE_SECONDS)]
        if here["Resources"].get(self._device, 0):
            tries.insert(0, (addresses[driver], NEAR_SECONDS))
        for first_on, seconds in tries:
            self._group = placement_group(new_bundles(self._device, count, first_on=first_on), strategy="PACK")
            self._owns_group = True
            if self._group.wait(seconds):
                break
            remove_placement_group(self._group)
            self._owns_group = False
        else:
            self._check_room(count, waited=sum(seconds for _, seconds in tries))
        return _bundles_of(self._group)

    def _check_room(self, count: int, *, waited: float = 0.0) -> None:
        total, free = (told.get(self._device, 0.0) for told in (ray.cluster_resources(), ray.available_resources()))
        check_room(self._device, count, total=total, free=free, waited=waited)


def _bundles_of(group: Any) -> list[Bundle]:
    """Of a group that has been placed, in their order."""
    table = placement_group_table(group)
    nodes = table["bundles_to_node_id"]
    return [Bundle(index, nodes[index], holds) for index, holds in sorted(table["bundles"].items())]


def _reason(error: BaseException) -> str:
    """What Ray says in one line, without its list of ids and its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("class_name:", "actor_id:", "pid:", "namespace:", "ip:"))]
    return (" ".join(told) or type(error).__name__)[:300]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
