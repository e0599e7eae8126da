"""Which worker goes into which bundle of a Ray placement group: pure, from what Ray says of bundles and nodes.

Knows no Ray. A node is meant by its id; its address is for people and for deciding who can reach whom.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from moe_serve.base.errors import ConfigError

Device = Literal["GPU", "CPU"]
CPU_SHARE = 0.01
"""Of a core, for a worker on CPUs: ranks may outnumber cores."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """`holds` resources by Ray's names, on a node."""

    index: int
    node: str
    holds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """Of one worker; as many as `neighbours` workers of its engine are on its node, itself among them."""

    bundle: int
    node: str
    address: str
    neighbours: int


def new_bundles(device: Device, count: int, *, first_on: str = "") -> list[dict[str, float]]:
    """What to ask of Ray for as many workers; the first on the node with this address, if one is given."""
    bundles = [{str(device): worker_share(device)} for _ in range(count)]
    if first_on:
        bundles[0] |= pinned(first_on)
    return bundles


def pinned(address: str) -> dict[str, float]:
    """What a bundle must hold besides to be on the node with this address: each has 1 of a resource of its name."""
    return {f"node:{address}": 0.001}


def parse_indices(text: str, *, count: int) -> list[int]:
    """Bundles for as many ranks, such as "0,1,4"; ConfigError unless they are so many and differ."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ConfigError(
            f"ray_bundle_indices {text!r} must be numbers of bundles with commas between, such as 0,1 "
            "(option --ray-bundle-indices)"
        )
    indices = [int(part) for part in parts]
    if len(indices) != count:
        raise ConfigError(
            f"ray_bundle_indices {text!r} names {len(indices)} bundles for {count} ranks (data x pipeline x tensor "
            "parallel); give one for each (option --ray-bundle-indices)"
        )
    if doubled := sorted({index for index in indices if indices.count(index) > 1}):
        raise ConfigError(
            f"ray_bundle_indices {text!r} names {', '.join(map(str, doubled))} more than once; give each rank a bundle "
            "of its own (option --ray-bundle-indices)"
        )
    return indices


def choose_bundles(bundles: Sequence[Bundle], device: Device, count: int, *, indices: str = "") -> list[Bundle]:
    """As many bundles of a placement group: those of `indices`, else the first that hold the device.

    ConfigError if there are not so many, or one that is named does not exist or does not hold the device.
    """
    if not indices:
        fitting = [bundle for bundle in bundles if _holds(bundle, device)]
        if len(fitting) < count:
            raise ConfigError(
                f"the Ray placement group has {len(bundles)} bundles, {len(fitting)} of them with {_need(device)}, "
                f"but {count} ranks need one each; make a larger group, or start fewer ranks"
            )
        return fitting[:count]
    by_index = {bundle.index: bundle for bundle in bundles}
    chosen = []
    for index in parse_indices(indices, count=count):
        if index not in by_index:
            raise ConfigError(
                f"ray_bundle_indices {indices!r} names bundle {index}, but the Ray placement group has bundles 0 to "
                f"{len(bundles) - 1} (option --ray-bundle-indices)"
            )
        if not _holds(by_index[index], device):
            raise ConfigError(
                f"ray_bundle_indices {indices!r} names bundle {index}, which holds {_shown(by_index[index].holds)} and "
                f"not {_need(device)}; name another (option --ray-bundle-indices)"
            )
        chosen.append(by_index[index])
    return chosen


def place_workers(bundles: Sequence[Bundle], addresses: Mapping[str, str], *, driver: str) -> list[WorkerPlace]:
    """The place of each worker, by its index: workers of a node are neighbours.

    The driver's node comes first, then nodes with fewer workers, then lower addresses. `addresses` by node.
    """
    of_node = {bundle.node: [each for each in bundles if each.node == bundle.node] for bundle in bundles}
    nodes = sorted(of_node, key=lambda node: (node != driver, len(of_node[node]), address_key(addresses[node]), node))
    return [
        WorkerPlace(bundle=bundle.index, node=node, address=addresses[node], neighbours=len(of_node[node]))
        for node in nodes
        for bundle in of_node[node]
    ]


def check_addresses(nodes: Sequence[str], addresses: Mapping[str, str]) -> None:
    """ConfigError if two of the nodes have the same address: what listens on the one could be sought on the other."""
    key = addresses.__getitem__
    taken = {address: list(same) for address, same in groupby(sorted(sorted(set(nodes)), key=key), key=key)}
    if any(len(same) > 1 for same in taken.values()):
        told = "; ".join(f"{address}: {', '.join(node[:8] for node in same)}" for address, same in taken.items())
        raise ConfigError(
            f"nodes of the Ray cluster share an address ({told}); give each its own (ray start --node-ip-address)"
        )


def check_reach(
    places: Sequence[WorkerPlace],
    *,
    at: str,
    driver: str,
    driver_address: str,
    what: str = "workers",
    to: str = "engine",
) -> None:
    """ConfigError if that to which they go, such as the workers' engine, listens on loopback and a place is on another
    machine."""
    away = sorted({place.address for place in places if place.node != driver and not _is_loopback(place.address)})
    if away and _is_loopback(at):
        raise ConfigError(
            f"Ray places {what} on {', '.join(away)}, from where nobody can reach the {to} at {at}; give "
            f"--data-parallel-address, an address of this node that they can reach (Ray says: {driver_address})"
        )


def check_room(device: Device, count: int, *, total: float, free: float) -> None:
    """ConfigError if a cluster with so much of the device cannot hold so many workers."""
    if total < worker_share(device) * count:
        raise no_room(device, count, total=total, free=free)


def no_room(device: Device, count: int, *, total: float, free: float, waited: float = 0.0) -> ConfigError:
    """What to say of a cluster that has too little, or whose workers were not placed within a wait."""
    what = f"{total:g} {device}{'' if total == 1 else 's'}"
    need = "one each" if device == "GPU" else f"{CPU_SHARE:g} of one each"
    late = f" and could not be placed within {waited:g} s" if waited else ""
    return ConfigError(
        f"the Ray cluster has {what}, {free:g} of them free, but {count} workers need {need}{late}; start fewer ranks "
        "(--tensor-parallel-size, --pipeline-parallel-size), add nodes, or make the placement group beforehand "
        "(--ray-placement-group)"
    )


def worker_share(device: Device) -> float:
    """What a worker needs of a device."""
    return 1.0 if device == "GPU" else CPU_SHARE


def _holds(bundle: Bundle, device: Device) -> bool:
    return bundle.holds.get(device, 0.0) >= worker_share(device)


def _need(device: Device) -> str:
    return "a GPU" if device == "GPU" else f"{CPU_SHARE:g} of a CPU"


def _shown(holds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in holds.items()) or "nothing"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def address_key(address: str) -> tuple[int, int, str]:
    """Numbers by their value (10.0.0.2 before 10.0.0.10), then names."""
    try:
        number = ipaddress.ip_address(address)
    except ValueError:
        return (99, 0, address)
    return (number.version, int(number), "")
