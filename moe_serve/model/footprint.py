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

    `experts`: all its slots in all layers of its stage; `rest`: its other weights; `token_kv`: what its KV cache keeps
    of one token in these layers.
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
    rules = find_spec(config).weights
    times: dict[tuple[str, range], int] = {}
    for part in {each.layers: each for each in partitions}.values():
        for rule in rules:
            of_expert = "{expert}" in rule.parameter
            places = () if of_expert else rule.places(config)
            times[rule.parameter, part.layers] = sum(part.holds(rule.parameter, layer) for layer, _ in places)

    def of_rank(part: Partition) -> Footprint:
        slots = part.num_slots * len(part.moe_numbers)
        experts, rest = 0, 0
        for rule in rules:
            one = math.prod(len(part.held(axis)) for axis in rule.axes) * (4 if rule.float32 else ITEM_BYTES[dtype])
            experts += one * slots if "{expert}" in rule.parameter else 0
            rest += one * times[rule.parameter, part.layers]
        kept = len(part.layers) * len(part.kv_heads) * 2 * config.head_dim
        return Footprint(experts, rest, kept * ITEM_BYTES[dtype])

    return [of_rank(part) for part in partitions]
