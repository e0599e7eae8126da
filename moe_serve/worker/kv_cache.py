"""The paged KV cache of one rank: how large a block is, how many fit, and the tensors themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.model.context import LayerKV, TokenKV

CPU_CAP_BYTES = 4 * 2**30
"""A CPU's memory is everybody's: no rank takes more by itself."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one rank keeps for every token, layer by layer."""

    layers: tuple[TokenKV, ...]
    block_size: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, k and v of all layers."""
        return sum(kept.num_elements for kept in self.layers) * self.dtype.itemsize * self.block_size

    def allocate(self, num_blocks: int, device: torch.device) -> tuple[LayerKV, ...]:
        """One pair of tensors per layer; zeros, since a masked score of a stray NaN would still be NaN."""
        slots = num_blocks * self.block_size

        def zeros(heads: int, dim: int) -> Tensor:
            return _zeros((slots, heads, dim), self.dtype, device)

        return tuple(
            LayerKV(zeros(kept.num_kv_heads, kept.k_dim), zeros(kept.num_kv_heads, kept.v_dim)) for kept in self.layers
        )


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU memory that is zero because nobody has touched it: torch.zeros would write, and so take, all of it."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    untouched = torch.from_numpy(np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8))
    return untouched.view(dtype).view(size)


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens of one sequence."""
    return -(-num_tokens // block_size)


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes one rank may take for its KV cache, and in words where the number comes from.

    `cap` a courtesy to the other programs of a machine: not exceeded, unless one sequence would not fit.
    """

    num_bytes: int
    source: str
    cap: int | None = None


def fitting_blocks(shape: KVShape, config: Config, *, max_model_len: int, room: Room) -> int:
    """Blocks this rank can hold; no more than max_num_seqs full sequences need. ConfigError if not even one fits.

    kv_cache_memory_bytes counts instead of `room`, but is refused where there is not so much.
    """
    one = blocks_for(max_model_len, shape.block_size)
    most = one * config.scheduler.max_num_seqs
    asked = config.cache.kv_cache_memory_bytes
    if asked is not None:
        blocks = min(asked // shape.block_bytes, most)
        if blocks * shape.block_bytes > room.num_bytes:
            raise ConfigError(
                f"kv_cache_memory_bytes {asked:,} is more than each rank can have: {room.num_bytes:,} bytes "
                f"({room.source}); lower --kv-cache-memory-bytes"
            )
        source = f"kv_cache_memory_bytes is {asked:,}"
    else:
        budget = room.num_bytes if room.cap is None else min(room.num_bytes, max(room.cap, one * shape.block_bytes))
        blocks = min(budget // shape.block_bytes, most)
        source = f"there are {max(room.num_bytes, 0):,} ({room.source})"
    if blocks < one:
        raise ConfigError(
            f"one sequence of max_model_len {max_model_len} tokens needs {one * shape.block_bytes:,} bytes of KV "
            f"cache on each rank, but {source}; raise --kv-cache-memory-bytes or --gpu-memory-utilization, or lower "
            "--max-model-len"
        )
    return blocks


def cpu_room(config: Config, num_ranks: int, root: Path = Path("/")) -> Room:
    """A rank's part of the share of the memory now available on this machine; all of it if the operator gave bytes."""
    available = available_memory(root)
    if config.cache.kv_cache_memory_bytes is not None:
        return Room(available // num_ranks, f"{available:,} bytes available now, divided by {num_ranks} ranks here")
    share = config.cache.gpu_memory_utilization
    source = f"gpu_memory_utilization {share:g} of {available:,} bytes available now, divided by {num_ranks} ranks here"
    return Room(int(available * share) // num_ranks, source, cap=CPU_CAP_BYTES)


def cuda_room(config: Config, device: torch.device, *, num_ranks: int, reserve: int) -> Room:
    """What the share of the device leaves after all that is on it and `reserve` for activations of each rank."""
    free, total = torch.cuda.mem_get_info(device)
    share = 1.0 if config.cache.kv_cache_memory_bytes is not None else config.cache.gpu_memory_utilization
    source = (
        f"gpu_memory_utilization {share:g} of {total:,} bytes on {device}, less what is in use, divided by {num_ranks} "
        f"ranks on it, less {reserve:,} for activations"
    )
    return Room(int(free - (1 - share) * total) // num_ranks - reserve, source)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes a process here may still take: MemAvailable, or less where a control group says so."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    fields = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines) if rest}
    available = int(fields.get("MemAvailable", fields["MemFree"])) * 1024
    return max(0, min([available, *_cgroup_rooms(root)]))


def _cgroup_rooms(root: Path) -> list[int]:
    """Bytes left in each memory control group that holds this process (version 1 and 2)."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in memberships:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            names = ("memory.max", "memory.current", "inactive_file")
            top = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / "sys/fs/cgroup/memory"
        else:
            continue
        here = Path(path.lstrip("/"))
        # In a container the path may be the host's, which is not mounted: then only the top is there.
        for folder in (here, *here.parents):
            room = _room(top / folder, *names)
            if room is not None:
                rooms.append(room)
    return rooms


def _room(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """Limit less usage, page cache that can be dropped not counted; None where there is no limit."""
    try:
        limit = int((folder / limit_name).read_text())
        usage = int((folder / usage_name).read_text())
        stat = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    cache = next((int(line.split()[1]) for line in stat if line.startswith(cache_name + " ")), 0)
    return limit - usage + cache
