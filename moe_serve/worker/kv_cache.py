"""The paged KV cache of one rank: how large a block is, how many fit, and the tensors themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.model.context import LayerKV

CPU_CAP_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one rank keeps for every token; `num_kv_heads` are this rank's own."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, k and v of all layers."""
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        return per_token * self.block_size

    def allocate(self, num_blocks: int, device: torch.device) -> tuple[LayerKV, ...]:
        """One pair of tensors per layer; zeros, since a masked score of a stray NaN would still be NaN."""
        size = (num_blocks * self.block_size, self.num_kv_heads, self.head_dim)
        return tuple(
            LayerKV(
                torch.zeros(size, dtype=self.dtype, device=device),
                torch.zeros(size, dtype=self.dtype, device=device),
            )
            for _ in range(self.num_layers)
        )


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold so many tokens of one sequence."""
    return -(-num_tokens // block_size)


def fitting_blocks(shape: KVShape, config: Config, *, max_model_len: int, available_bytes: int) -> int:
    """Blocks this rank can hold; no more than max_num_seqs full sequences need. ConfigError if not even one fits.

    `available_bytes` is this rank's share, used unless kv_cache_memory_bytes says otherwise.
    """
    asked = config.cache.kv_cache_memory_bytes
    budget = available_bytes if asked is None else asked
    one = blocks_for(max_model_len, shape.block_size)
    blocks = min(budget // shape.block_bytes, one * config.scheduler.max_num_seqs)
    if blocks < one:
        source = (
            f"kv_cache_memory_bytes is {asked:,}"
            if asked is not None
            else f"gpu_memory_utilization {config.cache.gpu_memory_utilization:g} leaves {max(budget, 0):,}"
        )
        raise ConfigError(
            f"one sequence of max_model_len {max_model_len} tokens needs {one * shape.block_bytes:,} bytes of KV "
            f"cache on each rank, but {source}; raise --kv-cache-memory-bytes or --gpu-memory-utilization, or lower "
            "--max-model-len"
        )
    return blocks


def cpu_share_bytes(utilization: float, num_ranks: int, root: Path = Path("/")) -> int:
    """This rank's share of the memory now available on this machine, capped at 4 GiB."""
    return min(int(available_memory(root) * utilization) // num_ranks, CPU_CAP_BYTES)


def cuda_share_bytes(utilization: float, device: torch.device, *, num_ranks: int, reserve: int) -> int:
    """What `utilization` of the device leaves after all that is on it and `reserve` for activations of each rank."""
    free, total = torch.cuda.mem_get_info(device)
    return int(free - (1 - utilization) * total) // num_ranks - reserve


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
