"""Which engine goes to which nodes of a Ray cluster: pure, from how much room they have. Knows no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_serve.base.errors import ConfigError
from moe_serve.executor.ray_placement import address_key


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """A node that can hold so many `workers`."""

    node: str
    address: str
    workers: int


def spread_engines(
    rooms: Sequence[NodeRoom], *, engines: int, size: int, driver: str, local: int | None = None
) -> list[str]:
    """The node of each worker of `engines` that have `size` workers each, engine by engine.

    Nodes are filled one after the other, the driver's first, then lower addresses; with `local` the driver's gets so
    many engines, and no other more. Without it, engines that no node can hold whole lie over several, and come last.
    ConfigError where there is no room.
    """
    nodes = sorted(rooms, key=lambda room: (room.node != driver, address_key(room.address), room.node))
    left = {room.node: room.workers for room in nodes}
    if local is not None:
        _check_driver(left.get(driver, 0), size, local)
    placed: list[str] = []
    for node in left:
        most = left[node] // size if local is None else min(local, left[node] // size)
        taken = min(most * size, engines * size - len(placed))
        placed += [node] * taken
        left[node] -= taken
    if local is None:
        placed += [node for node, workers in left.items() for _ in range(workers)][: engines * size - len(placed)]
    if len(placed) < engines * size:
        raise _no_room(nodes, len(placed) // size, engines=engines, size=size, local=local)
    return placed


def _check_driver(workers: int, size: int, local: int) -> None:
    if workers < local * size:
        raise ConfigError(
            f"data_parallel_size_local is {local}, but this node has room in the Ray cluster for {workers // size} "
            f"engines of {_workers(size)} (it can hold {workers}); give a smaller --data-parallel-size-local, or leave "
            "it out"
        )


def _no_room(nodes: Sequence[NodeRoom], found: int, *, engines: int, size: int, local: int | None) -> ConfigError:
    has = ", ".join(f"{room.address} for {room.workers}" for room in nodes) or "none"
    most = "" if local is None else f", at most {local} on a node (--data-parallel-size-local)"
    return ConfigError(
        f"the Ray cluster has room for {found} of {engines} engines of {_workers(size)}{most} (nodes: {has}); add "
        "nodes, or start fewer ranks (--data-parallel-size, --tensor-parallel-size, --pipeline-parallel-size)"
    )


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'}"
