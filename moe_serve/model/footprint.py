"""What one rank's part of a model takes, in bytes: by its rules alone, so that nothing need be read. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from moe_serve.model.archs.base import find_spec
from moe_serve.model.partition import Partition

ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one rank.

    `experts`: all its slots in all layers; `rest`: its other weights; `token_kv`: what its KV cache keeps of one
    token in all layers.
    """

    experts: int
    rest: int
    token_kv: int

    @property
    def weights(self) -> int:
        return self.experts + self.rest


def footprints(partitions: Sequence[Partition], dtype: str) -> list[Footprint]:
    """Of all ranks of one world (at least one); `dtype` of the weights as config.json names types."""
    config = partitions[0].config
    rules = [
        (rule, 0 if "{expert}" in rule.parameter else sum(1 for _ in rule.places(config)))
        for rule in find_spec(config).weights
    ]

    def of_rank(part: Partition) -> Footprint:
        slots = part.num_slots * len(config.moe_layers)
        experts, rest = 0, 0
        for rule, times in rules:
            one = math.prod(len(part.held(axis)) for axis in rule.axes) * (4 if rule.float32 else ITEM_BYTES[dtype])
            experts += 0 if times else one * slots
            rest += one * times
        kept = config.num_layers * len(part.kv_heads) * 2 * config.head_dim
        return Footprint(experts, rest, kept * ITEM_BYTES[dtype])

    return [of_rank(part) for part in partitions]
