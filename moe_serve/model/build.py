"""build_model: one rank's empty decoder out of a ModelConfig, the parallel options and the rank's groups."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import cast

import torch

from moe_serve.base.errors import NoSharedMemory
from moe_serve.base.model_config import ModelConfig
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.base.tables import ALL2ALL
from moe_serve.model.all2all.alone import Alone
from moe_serve.model.all2all.base import All2All
from moe_serve.model.all2all.limits import LIMITS, check_dispatch
from moe_serve.model.all2all.shape import DispatchShape, ExpertLayout, dispatch_shape, expert_layout
from moe_serve.model.attention.base import ATTENTION, AttentionBackend
from moe_serve.model.attention.context_parallel import ContextParallel
from moe_serve.model.decoder import Decoder, DecoderLayer
from moe_serve.model.layers.embedding import VocabEmbedding, VocabHead
from moe_serve.model.layers.gqa import Attention
from moe_serve.model.layers.linear import weight
from moe_serve.model.layers.mlp import DenseMLP, SharedExpert
from moe_serve.model.layers.norm import RMSNorm
from moe_serve.model.moe.expert_map import ExpertMap, even_copies
from moe_serve.model.moe.experts import Experts
from moe_serve.model.moe.layer import MoELayer
from moe_serve.model.moe.router import Router
from moe_serve.model.partition import Partition, make_partition
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.groups import Groups

log = logging.getLogger(__name__)


def build_model(
    config: ModelConfig,
    parallel: ParallelConfig,
    rank: int,
    groups: Groups,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_tokens: int,
    path: str | None = None,
    attention: str | None = None,
) -> Decoder:
    """The part of global rank `rank`, its parameters not yet filled; for steps of at most `max_tokens` of an engine.

    `path` of moe_kernels that its layers run on, torch's own operations if None.

    ConfigError where the model cannot be cut so, or the all-to-all backend cannot carry it.
    """
    partition = make_partition(config, parallel, rank)
    backend = _attention(attention or ("sdpa" if path is None else "paged"), partition, groups.dcp, device, path)
    shape = dispatch_shape(
        config,
        parallel,
        max_tokens=max_tokens,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
    )
    layout = expert_layout(partition)
    all2all = make_all2all(parallel.all2all_backend, groups.ep, layout, replace(shape, path=path))
    maker = _Maker(partition, groups, backend, all2all, dtype, device, path)
    embedding = maker.embedding() if partition.is_first else None
    layers = [maker.layer(index) for index in partition.layers]
    norm, head = (maker.norm(), maker.head(embedding)) if partition.is_last else (None, None)
    return Decoder(partition, layers, embedding, norm, head, backend, all2all, path)


def _attention(
    name: str, partition: Partition, sharing: Group, device: torch.device, path: str | None
) -> AttentionBackend:
    """The backend of this name, or where ranks share a KV cache the one that can."""
    heads, head_dim = partition.heads, partition.config.head_dim
    if sharing.size > 1:
        return ContextParallel(len(heads), head_dim, sharing, device)
    kind = cast(type[AttentionBackend], ATTENTION.load(name))
    return kind(len(heads), len(partition.kv_heads), head_dim, device, path)


def make_all2all(name: str, group: Group, layout: ExpertLayout, shape: DispatchShape) -> All2All:
    """The backend of this name, or what stands in for it: where the ranks, which all find out, have no memory for it,
    and where there is but one."""
    check_dispatch(name, shape, layout)
    if group.size == 1:
        return Alone()
    try:
        return cast(type[All2All], ALL2ALL.load(name))(group, layout, shape)
    except NoSharedMemory as error:
        other = LIMITS[name].fallback
        assert other is not None, f"{name} needs memory and has no fallback"
        if group.rank == 0:
            log.warning(
                "--all2all-backend %s needs memory that ranks %s share, and %s; %s is used instead",
                name,
                ", ".join(map(str, group.ranks)),
                error,
                other,
            )
        return make_all2all(other, group, layout, shape)


class _Maker:
    """Makes the parts, which share backends, type, device and path."""

    def __init__(
        self,
        partition: Partition,
        groups: Groups,
        backend: AttentionBackend,
        all2all: All2All,
        dtype: torch.dtype,
        device: torch.device,
        path: str | None,
    ) -> None:
        self.partition, self.groups = partition, groups
        self.backend, self.all2all = backend, all2all
        self.dtype, self.device, self.path = dtype, device, path

    def norm(self) -> RMSNorm:
        config = self.partition.config
        return RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=self.dtype, device=self.device, path=self.path)

    def embedding(self) -> VocabEmbedding:
        partition = self.partition
        return VocabEmbedding(
            partition.vocab, partition.config.hidden_size, self.groups.tp, dtype=self.dtype, device=self.device
        )

    def head(self, embedding: VocabEmbedding | None) -> VocabHead:
        """On the embedding's own weight where the two are tied and on one stage."""
        partition = self.partition
        if embedding is not None and partition.config.tie_word_embeddings:
            rows = embedding.weight
        else:
            rows = weight(len(partition.vocab), partition.config.hidden_size, dtype=self.dtype, device=self.device)
        return VocabHead(rows, partition.vocab_sizes, self.groups.tp, path=self.path)

    def layer(self, index: int) -> DecoderLayer:
        attention = Attention(
            self.partition, self.groups.tp, self.backend, dtype=self.dtype, device=self.device, path=self.path
        )
        config = self.partition.config
        spec = config.layers[index]
        assert spec.attention == "gqa"
        feed_forward = self._moe(config.moe_layers.index(index)) if spec.feed_forward == "moe" else self._dense()
        return DecoderLayer(index, self.norm(), attention, self.norm(), feed_forward)

    def _dense(self) -> DenseMLP:
        hidden, width = self.partition.config.hidden_size, len(self.partition.dense)
        return DenseMLP(hidden, width, self.groups.tp, dtype=self.dtype, device=self.device, path=self.path)

    def _moe(self, number: int) -> MoELayer:
        """The one of this number among the MoE layers."""
        config = self.partition.config
        router = Router(config.hidden_size, config.num_experts, config.router, device=self.device, path=self.path)
        experts = Experts(
            len(self.partition.experts_of(number)),
            config.hidden_size,
            len(self.partition.width),
            self.dtype,
            self.device,
            path=self.path,
        )
        return MoELayer(router, self._expert_map(number), experts, self.all2all, self.groups.tp, self._shared())

    def _shared(self) -> SharedExpert | None:
        config = self.partition.config
        if config.shared_expert_size is None:
            return None
        size = config.shared_expert_size
        return SharedExpert(config.hidden_size, size, dtype=self.dtype, device=self.device, path=self.path)

    def _expert_map(self, number: int) -> ExpertMap:
        placement = self.partition.placement
        if placement is None:
            return ExpertMap(None, None, salt=0)
        slots_EC, shares_EC = even_copies(placement.physical_to_logical_LP[number].tolist(), placement.num_logical)
        salt = 1 + number * placement.num_ranks + self.partition.ep_rank
        return ExpertMap(slots_EC.to(self.device), shares_EC.to(self.device), salt=salt)
