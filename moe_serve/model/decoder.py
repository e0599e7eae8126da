"""The one decoder skeleton: embedding, layers of attention and experts, final norm, head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_serve.base.model_config import ModelConfig
from moe_serve.model.all2all.base import All2All
from moe_serve.model.attention.base import AttentionBackend
from moe_serve.model.context import ForwardContext, LayerKV
from moe_serve.model.layers.embedding import VocabEmbedding, VocabHead
from moe_serve.model.layers.gqa import Attention
from moe_serve.model.layers.mlp import SharedExpert
from moe_serve.model.layers.norm import RMSNorm
from moe_serve.model.layers.rope import Rope, Rotation
from moe_serve.model.moe.layer import MoELayer
from moe_serve.model.partition import Partition


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(
        self, index: int, attention_norm: RMSNorm, attention: Attention, moe_norm: RMSNorm, moe: MoELayer
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.moe_norm, self.moe = moe_norm, moe
        self.attention_phase, self.moe_phase = f"layer {index} attention", f"layer {index} experts"

    def forward(self, x_TD: Tensor, rotation: Rotation, kv: LayerKV, ctx: ForwardContext) -> Tensor:
        if x_TD.shape[0]:  # a dummy step brings no rows, on all TP ranks alike; its experts still serve other engines
            ctx.progress.enter(self.attention_phase)
            x_TD = x_TD + self.attention(self.attention_norm(x_TD), rotation, kv, ctx)
        ctx.progress.enter(self.moe_phase)
        moe_TD: Tensor = self.moe(self.moe_norm(x_TD), ctx)
        return x_TD + moe_TD


class Decoder(nn.Module):
    """A rank's part of the model. `attention_backend.plan()` makes what `ctx.attention` needs."""

    def __init__(
        self,
        partition: Partition,
        layers: Sequence[DecoderLayer],
        embedding: VocabEmbedding,
        norm: RMSNorm,
        head: VocabHead,
        attention_backend: AttentionBackend,
        all2all: All2All,
    ) -> None:
        super().__init__()
        self.partition = partition
        self.embedding, self.layers, self.norm, self.head = embedding, nn.ModuleList(layers), norm, head
        self.attention_backend, self.all2all = attention_backend, all2all
        config = partition.config
        self.rope = Rope(config.head_dim, config.rope_theta, embedding.weight.device)

    @property
    def config(self) -> ModelConfig:
        return self.partition.config

    @property
    def num_kv_heads(self) -> int:
        """KV heads this rank caches."""
        return len(self.partition.kv_heads)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @torch.inference_mode()
    def forward(self, token_ids_T: Tensor, ctx: ForwardContext) -> Tensor:
        """Hidden states after the final norm, (T, D). All ranks of the world call this in step."""
        ctx.progress.enter("embedding")
        x_TD = self.embedding(token_ids_T)
        rotation = self.rope.rotation(ctx.positions_T, x_TD.dtype)
        for layer, kv in zip(self.layers, ctx.kv, strict=True):
            x_TD = layer(x_TD, rotation, kv, ctx)
        hidden_TD: Tensor = self.norm(x_TD)
        return hidden_TD

    @torch.inference_mode()
    def logits(self, hidden_SD: Tensor) -> Tensor:
        """(S, V) float32, the whole vocabulary on every TP rank; all of them call it with the same rows."""
        logits_SV: Tensor = self.head(hidden_SD)
        return logits_SV

    def moe_layers(self) -> list[MoELayer]:
        """The mixture-of-experts part of each layer, in order."""
        found = []
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            found.append(layer.moe)
        return found

    def targets(self) -> dict[str, Tensor]:
        """Parameter name of the weight rules -> view of this rank's memory; absent for what it does not hold."""
        found: dict[str, Tensor] = {"embedding.weight": self.embedding.weight, "norm.weight": self.norm.weight}
        if self.head.weight is not self.embedding.weight:
            found["head.weight"] = self.head.weight
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            found |= {f"layers.{index}.{name}": view for name, view in self._layer_targets(index, layer).items()}
        return found

    def _layer_targets(self, index: int, layer: DecoderLayer) -> dict[str, Tensor]:
        moe = layer.moe
        found: dict[str, Tensor] = {
            "attention_norm.weight": layer.attention_norm.weight,
            "moe_norm.weight": layer.moe_norm.weight,
            "router.weight": moe.router.weight,
        }
        found |= {f"attention.{name}": view for name, view in layer.attention.targets().items()}
        if isinstance(moe.shared, SharedExpert):
            found |= {f"shared.{name}": view for name, view in moe.shared.targets().items()}
        for slot, expert in enumerate(self.partition.experts_of(index)):
            found |= {f"experts.{expert}.{name}": view for name, view in moe.experts.targets(slot).items()}
        return found

    def finish_loading(self) -> None:
        """Every target was filled; what only this rank knows of follows."""
        self._fill_copies()
        for moe in self.moe_layers():
            moe.experts.finish_loading()

    def _fill_copies(self) -> None:
        """Copies of an expert on this rank: one of them was filled (see targets), the others follow."""
        for index, moe in enumerate(self.moe_layers()):
            held = self.partition.experts_of(index)
            filled = {expert: slot for slot, expert in enumerate(held)}
            for slot, expert in enumerate(held):
                if filled[expert] == slot:
                    continue
                for part, source in zip(moe.experts.parts(slot), moe.experts.parts(filled[expert]), strict=True):
                    part.copy_(source)

    def expert_bytes(self) -> int:
        """Bytes of one expert's slot in the layer that has the largest; 0 without experts."""
        return max((moe.experts.slot_bytes for moe in self.moe_layers()), default=0)

    def weight_bytes(self) -> int:
        """Bytes of this rank's parameters, a shared one counted once."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    def close(self) -> None:
        """Release what the all-to-all backend holds."""
        self.all2all.close()
