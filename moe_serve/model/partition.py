"""Partition: what one rank holds along each axis of the weights. Pure integers; the decoder and the loader agree by it.

Layers are cut over pipeline stages; attention and vocabulary over the tensor-parallel ranks of a stage, experts over
its dp x tp ranks: whole experts with expert parallelism, else a slice of every expert's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_serve.base.errors import ConfigError
from moe_serve.base.model_config import ModelConfig
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.base.topology import get_pp_indices, split_range
from moe_serve.eplb.first_placement import first_placement
from moe_serve.eplb.placement import Placement

Axis = Literal["vocab", "hidden", "heads", "kv_heads", "head_dim", "experts", "width", "dense", "shared", "one"]


@dataclass(frozen=True, slots=True)
class Partition:
    """One rank's part. `vocab_sizes` of every TP rank; `kv_replicas` TP ranks that hold the same KV head.

    `placement` (of all MoE layers, each over the ranks of its own stage) is None when experts are cut by width instead
    of spread; `width` is then a part of range(F). `dense` of a dense layer's width. `layers` of this rank's stage.
    """

    config: ModelConfig
    layers: range
    heads: range
    kv_heads: range
    kv_replicas: int
    vocab: range
    vocab_sizes: tuple[int, ...]
    width: range
    dense: range
    placement: Placement | None
    ep_rank: int

    @property
    def is_first(self) -> bool:
        """Whether this is the stage that embeds tokens."""
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the stage that has the final norm and the head."""
        return self.layers.stop == self.config.num_layers

    @property
    def moe_numbers(self) -> range:
        """The stage's layers that have experts, as counted among all MoE layers."""
        before = sum(layer < self.layers.start for layer in self.config.moe_layers)
        return range(before, before + sum(layer in self.layers for layer in self.config.moe_layers))

    def holds(self, parameter: str, layer: int | None) -> bool:
        """Whether a parameter is of this rank's stage. A tied embedding is needed at both ends."""
        if layer is not None:
            return layer in self.layers
        if parameter.startswith("embedding"):
            return self.is_first or (self.is_last and self.config.tie_word_embeddings)
        return self.is_last

    @property
    def num_slots(self) -> int:
        """Experts, copies counted, whose weights this rank holds in each MoE layer."""
        return self.config.num_experts if self.placement is None else len(self.placement.slots_of(self.ep_rank))

    def experts_of(self, moe_layer: int) -> list[int]:
        """Logical experts whose weights this rank holds in a layer (counted among MoE layers), in slot order."""
        if self.placement is None:
            return list(range(self.config.num_experts))
        experts: list[int] = self.placement.logical_of(moe_layer, self.ep_rank).tolist()
        return experts

    def size(self, axis: Axis) -> int:
        """The whole length of an axis, as the checkpoint has it."""
        config = self.config
        sizes: dict[Axis, int] = {
            "vocab": config.vocab_size,
            "hidden": config.hidden_size,
            "heads": config.num_heads * config.head_dim,
            "kv_heads": config.num_kv_heads * config.head_dim,
            "head_dim": config.head_dim,
            "experts": config.num_experts,
            "width": config.expert_size,
            "dense": config.dense_size or 0,
            "shared": config.shared_expert_size or 0,
            "one": 1,
        }
        return sizes[axis]

    def held(self, axis: Axis) -> range:
        """This rank's part of an axis."""
        d = self.config.head_dim
        parts: dict[Axis, range] = {
            "vocab": self.vocab,
            "heads": range(self.heads.start * d, self.heads.stop * d),
            "kv_heads": range(self.kv_heads.start * d, self.kv_heads.stop * d),
            "width": self.width,
            "dense": self.dense,
        }
        return parts.get(axis, range(self.size(axis)))


def make_partition(config: ModelConfig, parallel: ParallelConfig, rank: int) -> Partition:
    """The part of global rank `rank`; ConfigError where the model cannot be cut so."""
    return _part(config, parallel, rank, _place(config, parallel))


def make_partitions(config: ModelConfig, parallel: ParallelConfig) -> list[Partition]:
    """The parts of all ranks of the world, in order, as make_partition would give them."""
    placement = _place(config, parallel)
    return [_part(config, parallel, rank, placement) for rank in range(parallel.topology.world_size)]


def _place(config: ModelConfig, parallel: ParallelConfig) -> Placement | None:
    if not parallel.enable_expert_parallel:
        return None
    return first_placement(parallel, num_layers=len(config.moe_layers), num_experts=config.num_experts)


def _part(config: ModelConfig, parallel: ParallelConfig, rank: int, placement: Placement | None) -> Partition:
    topology = parallel.topology
    _, pp_rank, tp_rank = topology.coordinates(rank)
    tp, ep, ep_rank = topology.tp, topology.ep, topology.ep_rank(rank)
    _check_heads(config, tp)
    if config.num_layers < topology.pp:
        raise ConfigError(
            f"{config.num_layers} layers cannot be spread over {topology.pp} pipeline stages: one would have none; "
            "lower --pipeline-parallel-size"
        )
    kv_replicas = max(1, tp // config.num_kv_heads)
    _check_sharing(kv_replicas, topology.dcp)
    width = range(config.expert_size)
    if placement is None and config.expert_size < ep:
        raise ConfigError(
            f"experts of width {config.expert_size} cannot be cut over {ep} ranks (--data-parallel-size x "
            "--tensor-parallel-size); use fewer ranks, or --enable-expert-parallel to spread whole experts"
        )
    if placement is None:
        width = _cut_width(config.expert_size, ep, ep_rank)
    if config.dense_size is not None and config.dense_size < tp:
        raise ConfigError(
            f"dense layers of width {config.dense_size} cannot be cut over {tp} ranks; lower --tensor-parallel-size"
        )
    return Partition(
        config=config,
        layers=range(*get_pp_indices(config.num_layers, pp_rank, topology.pp)),
        heads=split_range(config.num_heads, tp, tp_rank),
        kv_heads=split_range(config.num_kv_heads, tp // kv_replicas, tp_rank // kv_replicas),
        kv_replicas=kv_replicas,
        vocab=split_range(config.vocab_size, tp, tp_rank),
        vocab_sizes=tuple(len(split_range(config.vocab_size, tp, other)) for other in range(tp)),
        width=width,
        dense=range(0) if config.dense_size is None else _cut_width(config.dense_size, tp, tp_rank),
        placement=placement,
        ep_rank=ep_rank,
    )


def _cut_width(width: int, ranks: int, rank: int) -> range:
    """In multiples of 8 where that leaves nobody empty: grouped products want rows of whole 16 bytes."""
    unit = 8 if not width % 8 and width // 8 >= ranks else 1
    part = split_range(width // unit, ranks, rank)
    return range(part.start * unit, part.stop * unit)


def _check_sharing(kv_replicas: int, dcp: int) -> None:
    """Only ranks that would hold the same KV head can share its cache."""
    if kv_replicas % dcp:
        works = [str(size) for size in range(1, kv_replicas + 1) if not kv_replicas % size]
        raise ConfigError(
            f"--decode-context-parallel-size {dcp} does not divide the {kv_replicas} tensor-parallel ranks that hold "
            f"the same KV head; sizes that work: {', '.join(works)}"
        )


def _check_heads(config: ModelConfig, tp: int) -> None:
    """A rank's query heads must share whole KV heads, or all lie within one."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    works = [n for n in range(1, heads + 1) if not heads % n and (not kv_heads % n or not n % kv_heads)]
    if tp not in works:
        raise ConfigError(
            f"--tensor-parallel-size {tp} does not divide the model's {heads} query heads and {kv_heads} KV heads; "
            f"sizes that work: {', '.join(map(str, works))}"
        )
