"""The one decoder skeleton: embedding, layers of attention and feed-forward, final norm, head."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
from moe_kernels.recording import between, next_layer
from torch import Tensor, nn

from moe_serve.base.model_config import ModelConfig
from moe_serve.base.progress import Phase, Progress
from moe_serve.model.all2all.base import All2All
from moe_serve.model.attention.base import AttentionBackend
from moe_serve.model.context import ForwardContext, LayerKV, TokenKV
from moe_serve.model.layers.embedding import VocabEmbedding, VocabHead
from moe_serve.model.layers.gqa import Attention
from moe_serve.model.layers.linear import Linear
from moe_serve.model.layers.mlp import DenseMLP, GatedMLP
from moe_serve.model.layers.norm import RMSNorm, add
from moe_serve.model.layers.rope import Rope, Rotation
from moe_serve.model.moe.experts import Experts
from moe_serve.model.moe.layer import MoELayer
from moe_serve.model.partition import Partition
from moe_serve.model.turns import Turns


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(
        self,
        index: int,
        attention_norm: RMSNorm,
        attention: Attention,
        feed_forward_norm: RMSNorm,
        feed_forward: MoELayer | DenseMLP,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.feed_forward_norm, self.feed_forward = feed_forward_norm, feed_forward
        self.index = index
        self.feed_forward_phase = Phase.EXPERTS if isinstance(feed_forward, MoELayer) else Phase.DENSE

    def forward(self, x_TD: Tensor, rotation: Rotation, kv: LayerKV, ctx: ForwardContext) -> Tensor:
        if x_TD.shape[0]:
            between(partial(self._enter, Phase.ATTENTION), ctx)
            x_TD, normed_TD = self._attend(x_TD, rotation, kv, ctx)
        else:  # a dummy step brings no rows, on all TP ranks alike; its experts still serve other engines
            normed_TD = x_TD
        between(partial(self._enter, self.feed_forward_phase), ctx)
        return add(x_TD, self.feed_forward(normed_TD, ctx), self.feed_forward_norm.path)

    def in_turns(self, x_TD: Tensor, rotation: Rotation, kv: LayerKV, ctx: ForwardContext) -> Turns[Tensor]:
        """As forward(), but that it yields while rows travel to experts or back."""
        self._enter(Phase.ATTENTION, ctx)
        x_TD, normed_TD = self._attend(x_TD, rotation, kv, ctx)
        self._enter(self.feed_forward_phase, ctx)
        if isinstance(self.feed_forward, MoELayer):
            out_TD = yield from self.feed_forward.in_turns(normed_TD, ctx)
        else:
            out_TD = self.feed_forward(normed_TD, ctx)
        return add(x_TD, out_TD, self.feed_forward_norm.path)

    def _attend(self, x_TD: Tensor, rotation: Rotation, kv: LayerKV, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """x with what attention adds, and its norm for the second half of the layer."""
        started = time.perf_counter()
        out_TD = self.attention(self.attention_norm(x_TD), rotation, kv, ctx)
        made = self.feed_forward_norm.after_sum(x_TD, out_TD)
        ctx.traced("attention", started)
        return made

    def _enter(self, phase: Phase, ctx: ForwardContext) -> None:
        ctx.progress.enter(phase, layer=self.index)

    def targets(self) -> dict[str, Tensor]:
        """Logical weight -> where it lives, but for the experts, of which a layer does not know which it holds."""
        found: dict[str, Tensor] = {
            "attention_norm.weight": self.attention_norm.weight,
            "feed_forward_norm.weight": self.feed_forward_norm.weight,
        }
        found |= {f"attention.{name}": view for name, view in self.attention.targets().items()}
        if isinstance(self.feed_forward, DenseMLP):
            return found | {f"dense.{name}": view for name, view in self.feed_forward.targets().items()}
        found["router.weight"] = self.feed_forward.router.weight
        if self.feed_forward.shared is not None:
            found |= {f"shared.{name}": view for name, view in self.feed_forward.shared.targets().items()}
        return found


class Decoder(nn.Module):
    """A rank's part of the model. `attention_backend.plan()` makes what `ctx.attention` needs.

    `layers` of its pipeline stage. `embedding` on the first stage only; `norm` and `head` on the last only. `path` of
    moe_kernels that all of it runs on, torch's own operations if None.
    """

    def __init__(
        self,
        partition: Partition,
        layers: Sequence[DecoderLayer],
        embedding: VocabEmbedding | None,
        norm: RMSNorm | None,
        head: VocabHead | None,
        attention_backend: AttentionBackend,
        all2all: All2All,
        path: str | None = None,
    ) -> None:
        super().__init__()
        assert (embedding is not None) == partition.is_first
        assert (norm is not None) == (head is not None) == partition.is_last
        self.partition = partition
        self.embedding, self.layers, self.norm, self.head = embedding, nn.ModuleList(layers), norm, head
        self._layers = tuple(layers)  # the same again: what comes out of a ModuleList has lost its type
        self.attention_backend, self.all2all, self.path = attention_backend, all2all, path
        config = partition.config
        self.rope = Rope(config.head_dim, config.rope_theta, self.device)

    @property
    def config(self) -> ModelConfig:
        return self.partition.config

    @property
    def token_kv(self) -> tuple[TokenKV, ...]:
        """What each layer of this stage keeps of a token on this rank."""
        return tuple(layer.attention.token_kv for layer in self._layers)

    @property
    def dtype(self) -> torch.dtype:
        return self._layers[0].attention_norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self._layers[0].attention_norm.weight.device

    @torch.inference_mode()
    def forward(self, token_ids_T: Tensor, ctx: ForwardContext, hidden_TD: Tensor | None = None) -> Tensor:
        """Hidden states (T, D): after the final norm on the last stage, else what the next stage gets as `hidden_TD`.

        All ranks of a stage call this in step.
        """
        return self.through(*self.enter(token_ids_T, ctx, hidden_TD), ctx)

    def enter(
        self, token_ids_T: Tensor, ctx: ForwardContext, hidden_TD: Tensor | None = None
    ) -> tuple[Tensor, Rotation]:
        """The first half of forward(): what the layers begin with."""
        if self.embedding is not None:
            ctx.progress.enter(Phase.EMBEDDING)
            hidden_TD = self.embedding(token_ids_T, ctx.progress)
        assert hidden_TD is not None, "a stage that is not the first needs the hidden states of the one before"
        return hidden_TD, self.rope.rotation(ctx.positions_T, hidden_TD.dtype)

    def through(self, x_TD: Tensor, rotation: Rotation, ctx: ForwardContext) -> Tensor:
        """The second half: all layers and the norm behind them."""
        for layer, kv in zip(self._layers, ctx.kv, strict=True):
            x_TD = layer(x_TD, rotation, kv, ctx)
            next_layer()
        return x_TD if self.norm is None else self.norm(x_TD)

    def in_turns(self, x_TD: Tensor, rotation: Rotation, ctx: ForwardContext) -> Turns[Tensor]:
        """As through(), for at least one row, but that it yields while rows travel: another half's turn."""
        for layer, kv in zip(self._layers, ctx.kv, strict=True):
            x_TD = yield from layer.in_turns(x_TD, rotation, kv, ctx)
        return x_TD if self.norm is None else self.norm(x_TD)

    @torch.inference_mode()
    def logits(self, hidden_SD: Tensor, progress: Progress) -> Tensor:
        """(S, V) float32, the whole vocabulary on every TP rank of the last stage; all call it with the same rows."""
        assert self.head is not None, "only the last stage has the head"
        progress.enter(Phase.LOGITS)
        logits_SV: Tensor = self.head(hidden_SD, progress)
        return logits_SV

    def moe_layers(self) -> list[MoELayer]:
        """The feed-forward of those layers that have experts, in order: as `partition.moe_numbers` numbers them."""
        return [layer.feed_forward for layer in self._layers if isinstance(layer.feed_forward, MoELayer)]

    def targets(self) -> dict[str, Tensor]:
        """Parameter name of the weight rules -> view of this rank's memory; absent for what it does not hold."""
        found: dict[str, Tensor] = {}
        if self.embedding is not None:
            found["embedding.weight"] = self.embedding.weight
        if self.norm is not None and self.head is not None:
            found["norm.weight"] = self.norm.weight
            found["embedding.weight" if self.config.tie_word_embeddings else "head.weight"] = self.head.weight
        for layer in self._layers:
            found |= {f"layers.{layer.index}.{name}": view for name, view in layer.targets().items()}
        for number, moe in zip(self.partition.moe_numbers, self.moe_layers(), strict=True):
            for slot, expert in enumerate(self.partition.experts_of(number)):
                prefix = f"layers.{self.config.moe_layers[number]}.experts.{expert}"
                found |= {f"{prefix}.{name}": view for name, view in moe.experts.targets(slot).items()}
        return found

    def finish_loading(self) -> None:
        """Every target was filled; what only this rank knows of follows."""
        self._fill_copies()
        for module in self.modules():
            if isinstance(module, Linear | GatedMLP | Experts):
                module.finish_loading()
        if self.head is not None:
            self.head.finish_loading(self.embedding)

    def _fill_copies(self) -> None:
        """Copies of an expert on this rank: one of them was filled (see targets), the others follow."""
        for number, moe in zip(self.partition.moe_numbers, self.moe_layers(), strict=True):
            held = self.partition.experts_of(number)
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
