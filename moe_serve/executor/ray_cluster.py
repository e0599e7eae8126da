"""This process's connection to a Ray cluster, the placement group that it takes or makes there, and actors in it.

What engines and workers that are Ray actors have in common. An actor's process is its member's: whatever ends the one
ends the other, be it a kill, the end of whoever started it (Ray's driver or another actor), or the end of the group.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.runtime_env import RuntimeEnv
from ray.util.placement_group import (
    PlacementGroup,
    PlacementGroupID,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from moe_serve.base.errors import ConfigError
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.executor.ray_placement import Bundle, Device
from moe_serve.executor.ray_settings import runtime_environment
from moe_serve.executor.starting import describe_code
from moe_serve.world.member import thread_environment, threads_per_rank

CONNECT_SECONDS = 5.0
PLACE_SECONDS = 30.0
GONE_SECONDS = 3.0
FAREWELL_SECONDS = 1.0


class RayCluster:
    """First connect(), then a group, then actors; close() in the end. `asked_device` as the operator says it."""

    def __init__(self, parallel: ParallelConfig, asked_device: str) -> None:
        self._parallel = parallel
        self._asked_device = asked_device
        self._connected_here = False
        self._group: Any = None
        self._owns_group = False
        self._actors: list[Any] = []
        self.device: Device = "CPU"
        self.driver = ""
        """The node of this process."""
        self.addresses: dict[str, str] = {}
        """Of the nodes that live."""

    def connect(self) -> None:
        """ConfigError where no cluster answers, or for a runtime environment that Ray does not know."""
        self._check_runtime_environment()
        if not ray.is_initialized():
            self._connect()
        if self._asked_device == "auto":
            self.device = "GPU" if ray.cluster_resources().get("GPU", 0) else "CPU"
        else:
            self.device = "GPU" if self._asked_device == "cuda" else "CPU"
        self.driver = ray.get_runtime_context().get_node_id()
        self.addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}

    @property
    def group_id(self) -> str:
        """Of the group that was taken or made, for others of this cluster."""
        return str(self._group.id.hex())

    def take_group(self, told: str) -> list[Bundle]:
        """The bundles of somebody else's group, placed. ConfigError if there is none of this id."""
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
        return self._bundles()

    def make_group(self, bundles: list[dict[str, float]], seconds: float) -> list[Bundle] | None:
        """A group of our own with these bundles; None if it was not placed in time."""
        self._group = placement_group(bundles, strategy="PACK")
        self._owns_group = True
        if self._group.wait(seconds):
            return self._bundles()
        self._drop_group()
        return None

    def start_actor(self, actor_class: type, bundle: int, *, computes: bool) -> Any:
        """In a bundle of the group; one that `computes` has its device."""
        actor = (
            ray.remote(actor_class)
            .options(
                num_cpus=0,  # the bundle is the actor's, and its share of a core
                num_gpus=1 if computes and self.device == "GPU" else 0,
                max_restarts=0,
                runtime_env=runtime_environment(self._parallel, computes=computes),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
            )
            .remote()
        )
        self._actors.append(actor)
        return actor

    def end_actors(self) -> None:
        """Without waiting for their ends."""
        actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor)

    def close(self) -> None:
        """End what is left, and give back the group if it is ours. Safe to call twice."""
        self.end_actors()
        self._drop_group()
        if self._connected_here:
            self._connected_here = False
            ray.shutdown()

    def _check_runtime_environment(self) -> None:
        known = {name.removeprefix("_") for name in RuntimeEnv.known_fields}
        try:
            if unknown := sorted((self._parallel.ray_runtime_env or {}).keys() - known):
                raise ValueError(f"Ray knows no {', '.join(unknown)} there")
            # Which is told Ray only when an actor is made of it.
            ray.remote(ActorProcess).options(runtime_env=runtime_environment(self._parallel, computes=True))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"ray_runtime_env cannot be: {_first_line(error)} (option --ray-runtime-env)") from error

    def _connect(self) -> None:
        address = self._parallel.ray_address or os.environ.get("RAY_ADDRESS", "")
        where = f"no Ray cluster answers at {address}" if address else "no Ray cluster runs on this machine"
        try:
            if address:
                host, _, port = address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
            ray.init(address=address or "auto", logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{where} ({_first_line(error)}); start one (ray start --head), or give HOST:PORT of one "
                "(--ray-address or RAY_ADDRESS)"
            ) from error
        self._connected_here = True

    def _bundles(self) -> list[Bundle]:
        """Of the group, which has been placed, in their order."""
        table = placement_group_table(self._group)
        nodes = table["bundles_to_node_id"]
        return [Bundle(index, nodes[index], holds) for index, holds in sorted(table["bundles"].items())]

    def _drop_group(self) -> None:
        if self._owns_group:
            self._owns_group = False
            remove_placement_group(self._group)


class ActorProcess:
    """A process that is an actor, by the one call that lasts as long as it is of use and gives its exit code."""

    def __init__(self, actor: Any, work: Any, address: str) -> None:
        self._actor = actor
        self._work = work
        self._address = address
        self._lock = threading.Lock()
        self._end: tuple[int, str] | None = None

    @property
    def who(self) -> str:
        """For people."""
        return f"Ray actor {self._actor._actor_id.hex()[:8]} on {self._address}"

    def poll(self) -> int | None:
        """Ray does not say which signal ended a process, nor whether it crashed: one code for all of that."""
        with self._lock:
            if self._end is None:
                self._end = self._look()
            return None if self._end is None else self._end[0]

    @property
    def how(self) -> str:
        """It ended, for people, where poll() gave a code."""
        return "is gone" if self._end is None else self._end[1]

    def kill(self) -> None:
        """End it at once, and see it gone for a bounded time."""
        ray.kill(self._actor)
        deadline = time.monotonic() + GONE_SECONDS
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def _look(self) -> tuple[int, str] | None:
        done, _ = ray.wait([self._work], timeout=0)
        if not done:
            return None
        try:
            code = int(ray.get(done[0]))
            return code, describe_code(code)
        except RayActorError as error:
            return -signal.SIGKILL, f"was killed or crashed (Ray: {_reason(error)})"
        except RayTaskError as error:
            return 1, f"failed: {_first_line(error.cause)}"
        except RayError as error:
            return 1, f"failed (Ray: {_reason(error)})"


def enter_actor(environment: Mapping[str, str], neighbours: int) -> int:
    """Take up a process that Ray started, which has loaded neither torch nor anything else of ours yet: torch reads
    the `environment` when it is imported. The threads of each of so many `neighbours` of its machine."""
    threads = threads_per_rank(neighbours)
    os.environ.update({**environment, **thread_environment(threads)})
    return threads


def leave_actor(code: int) -> int:
    """Threads of torch and of the link must not keep the process, once its code has been told; nor say what they meet
    with until then."""
    logging.disable()
    threading.Timer(FAREWELL_SECONDS, os._exit, [code]).start()
    return code


def _reason(error: BaseException) -> str:
    """What Ray says in one line, without its list of ids and its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("class_name:", "actor_id:", "pid:", "namespace:", "ip:"))]
    return (" ".join(told) or type(error).__name__)[:300]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
