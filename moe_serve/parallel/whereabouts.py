"""Which ranks are in one place, and can reach each other past the network there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from moe_serve.base.errors import ConfigError
from moe_serve.parallel.collectives import Group


def place_identity(*namespaces: str) -> bytes:
    """32 bytes that processes have in common which run on one kernel and share these of its namespaces."""
    told = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    for name in namespaces:
        told += f"{name} {os.stat(f'/proc/self/ns/{name}').st_ino}\n".encode()
    return hashlib.sha256(told).digest()


def ranks_by_place(group: Group, *namespaces: str) -> list[list[int]]:
    """The group's own ranks by the places they are in, both in order; all of them call this."""
    own = torch.frombuffer(bytearray(place_identity(*namespaces)), dtype=torch.uint8).to(group.device)
    places: dict[bytes, list[int]] = {}
    for rank, identity in enumerate(group.all_gather(own[None]).tolist()):
        places.setdefault(bytes(identity), []).append(rank)
    return list(places.values())


def refuse_apart(group: Group, what: str, namespaces: Sequence[str], parted: str) -> None:
    """ConfigError, on all ranks, unless they are in one place; `parted`: how they can be parted on one machine."""
    first, *others = ranks_by_place(group, *namespaces)
    apart = sorted(group.ranks[rank] for place in others for rank in place)
    if apart:
        names = ", ".join(map(str, apart))
        raise ConfigError(
            f"{what}: rank{'s' if len(apart) > 1 else ''} {names} and rank {group.ranks[first[0]]} are on different "
            f"machines, or in containers with {parted} of their own"
        )
