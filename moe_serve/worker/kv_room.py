"""How many KV blocks fit: what one block takes against the bytes that a rank may have. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.memory import available_memory

CPU_CAP_BYTES = 4 * 2**30
"""A CPU's memory is everybody's: no rank takes more by itself."""


class BlockShape(Protocol):
    """How large a block is: tokens, and bytes of all layers on one rank."""

    @property
    def block_size(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...


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


def fitting_blocks(shape: BlockShape, config: Config, *, max_model_len: int, room: Room) -> int:
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


def cpu_room(config: Config, num_ranks: int, root: Path = Path("/"), *, beside: int = 0) -> Room:
    """A rank's part of the share of the memory now available on this machine; all of it if the operator gave bytes.

    Less `beside`: bytes that a rank will take in its steps, and has not yet.
    """
    less = f", less {beside:,} for logits and kernels"
    available = available_memory(root)
    if config.cache.kv_cache_memory_bytes is not None:
        source = f"{available:,} bytes available now, divided by {num_ranks} ranks here{less}"
        return Room(available // num_ranks - beside, source)
    share = config.cache.gpu_memory_utilization
    source = f"gpu_memory_utilization {share:g} of {available:,} bytes available now, divided by {num_ranks} ranks here"
    return Room(int(available * share) // num_ranks - beside, source + less, cap=CPU_CAP_BYTES)
