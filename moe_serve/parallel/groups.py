"""Topology -> the groups one rank belongs to: owned by who made them, passed as arguments, closed by their owner."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from moe_serve.base.errors import ConfigError, NoSharedMemory
from moe_serve.base.topology import Topology
from moe_serve.parallel.collectives import Group, alone
from moe_serve.parallel.memory_group import MemoryGroup
from moe_serve.parallel.process_groups import join_process_group
from moe_serve.parallel.shm import SharedMemory, share
from moe_serve.parallel.store import Store, local_address, open_store

CPU = torch.device("cpu")
CONTROL_INTS = 64
CONTROL_BYTES = 2 * 8 * CONTROL_INTS
"""Of each rank: two tables, used in turn."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Groups:
    """A worker's groups. Axes with the same ranks share one group. `control` is over the world, on the CPU; `dcp` has
    the ranks that share a KV cache.

    `migration`, where experts may move: over the ranks of `ep`, and used for nothing else.
    """

    world: Group
    dp: Group
    pp: Group
    tp: Group
    ep: Group
    dcp: Group
    control: Group
    _owned: list[Group] = field(repr=False)
    migration: Group | None = None

    def close(self) -> None:
        """Leave every group. Safe to call twice."""
        for group in self._owned:
            group.close()


def build_groups(
    topology: Topology,
    rank: int,
    *,
    store_host: str,
    store_port: int,
    token: str,
    device: torch.device,
    timeout_seconds: float = 300.0,
    migrates: bool = False,
    generation: int = 1,
) -> Groups:
    """Join the groups of a global rank through the world's store, which rank 0's engine keeps open elsewhere.

    Ranks of another `generation` of the world do not meet these: their groups have other names.
    """
    if topology.world_size == 1:
        one = alone("world", rank, device)
        control = one if device.type == "cpu" else alone("control", rank, CPU)
        return Groups(one, one, one, one, one, one, control, [], one if migrates else None)
    store, _ = open_store(store_host, store_port, is_master=False, token=token, timeout_seconds=timeout_seconds)
    meeting = _Meeting(store, rank, local_address(store_host, store_port), timeout_seconds, generation)
    axes = {
        "world": range(topology.world_size),
        "dp": topology.dp_group(rank),
        "pp": topology.pp_group(rank),
        "tp": topology.tp_group(rank),
        "ep": topology.ep_group(rank),
        "dcp": topology.dcp_group(rank),
    }
    made: dict[tuple[int, ...], Group] = {}
    for axis, ranks in axes.items():
        if tuple(ranks) not in made:
            is_tp = tuple(ranks) == tuple(axes["tp"])  # which waits for others several times a layer
            made[tuple(ranks)] = meeting.join(axis, ranks, device, shares_memory=is_tp)
    world, dp, pp, tp, ep, dcp = (made[tuple(ranks)] for ranks in axes.values())
    control = world if device.type == "cpu" else meeting.join("control", axes["world"], CPU)
    migration = meeting.join("migration", axes["ep"], device) if migrates else None
    owned = [*made.values(), control, *([] if migration is None else [migration])]
    return Groups(world, dp, pp, tp, ep, dcp, control, owned, migration)


@dataclass(frozen=True, slots=True)
class _Meeting:
    store: Store
    rank: int
    listen_host: str
    timeout_seconds: float
    generation: int

    def join(self, name: str, ranks: Sequence[int], device: torch.device, *, shares_memory: bool = False) -> Group:
        """Form one group of these global ranks, all of which do the same; `shares_memory` if they can have some."""
        if len(ranks) == 1:
            return alone(name, self.rank, device)
        backend: Literal["gloo", "nccl"] = "nccl" if device.type == "cuda" else "gloo"
        position = tuple(ranks).index(self.rank)
        process_group = join_process_group(
            self.store,
            name=f"g{self.generation} {name} {backend} of ranks {' '.join(map(str, ranks))}",
            rank=position,
            size=len(ranks),
            backend=backend,
            listen_host=self.listen_host,
            timeout_seconds=self.timeout_seconds,
        )

        def make(kind: type[Group]) -> Group:
            return kind(
                process_group,
                name=name,
                rank=position,
                ranks=ranks,
                device=device,
                timeout_seconds=self.timeout_seconds,
            )

        if not shares_memory or device.type != "cpu":
            return make(Group)
        try:
            return make(MemoryGroup)
        except (ConfigError, NoSharedMemory) as error:
            if position == 0:
                log.warning("ranks %s add up over the network: %s", ", ".join(map(str, ranks)), error)
            return make(Group)


class ControlGroup:
    """Ranks that exchange a few integers, such as the DP ranks' engines once per step. Used by one thread.

    With a `memory` of CONTROL_BYTES for each rank, up to CONTROL_INTS integers go through that.
    """

    def __init__(self, group: Group, memory: SharedMemory | None = None) -> None:
        self.group = group
        self.rank = group.rank
        self.size = group.size
        self._buffers: dict[int, torch.Tensor] = {}
        self._memory = memory
        self._num_exchanges = 0
        if memory is not None:
            words = memory.data[: CONTROL_BYTES * self.size].view(torch.int64)
            self._tables = words.view(2, self.size, CONTROL_INTS)

    def all_gather_ints(self, values: list[int]) -> list[list[int]]:
        """Every rank's integers (as many each), in order of rank. RankTimeout or EngineError if one is missing."""
        if self.size == 1:
            return [list(values)]
        if self._memory is not None and len(values) <= CONTROL_INTS:
            return self._through_memory(self._memory, values)
        table = self._buffers.get(len(values))
        if table is None:
            table = self._buffers[len(values)] = torch.empty((self.size, len(values)), dtype=torch.int64)
        table[:] = torch.tensor(values, dtype=torch.int64)
        gathered: list[list[int]] = self.group.exchange_rows(table).tolist()
        return gathered

    def sync_kv_cache_blocks(self, blocks: int) -> int:
        """The least over the ranks; -1 means no opinion (and is the answer if nobody has one)."""
        opinions = [row[0] for row in self.all_gather_ints([blocks]) if row[0] != -1]
        return min(opinions, default=-1)

    def close(self) -> None:
        """Leave the group. Safe to call twice."""
        if self._memory is not None:
            self._memory.close()
        self.group.close()

    def _through_memory(self, memory: SharedMemory, values: list[int]) -> list[list[int]]:
        """A table is written again only after all have published the exchange between, so they have read it."""
        self._num_exchanges += 1
        table = self._tables[self._num_exchanges % 2, :, : len(values)]
        table[self.rank] = torch.tensor(values, dtype=torch.int64)
        memory.publish(self._num_exchanges)
        memory.wait(self._num_exchanges, "all_gather")
        gathered: list[list[int]] = table.tolist()
        return gathered


def control_group(
    name: str,
    rank: int,
    ranks: Sequence[int],
    *,
    store_host: str,
    store_port: int,
    token: str,
    timeout_seconds: float = 300.0,
    generation: int = 1,
    shares_memory: bool = False,
) -> ControlGroup:
    """A gloo group over these ranks (of engines, or of processes), this `rank` among them, met at the world's store.

    `shares_memory`: what they tell each other goes through memory, if they can have some; all say the same.
    """
    if len(ranks) == 1:
        return ControlGroup(alone(name, rank, CPU))
    store, _ = open_store(store_host, store_port, is_master=False, token=token, timeout_seconds=timeout_seconds)
    meeting = _Meeting(store, rank, local_address(store_host, store_port), timeout_seconds, generation)
    group = meeting.join(name, ranks, CPU)
    if not shares_memory:
        return ControlGroup(group)
    try:
        return ControlGroup(group, share(group, CONTROL_BYTES * group.size))
    except (ConfigError, NoSharedMemory) as error:
        if group.rank == 0:
            log.warning("%s vote over the network: memory that they share cannot be had: %s", name, error)
        return ControlGroup(group)
