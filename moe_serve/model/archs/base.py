"""An architecture as data: which checkpoint tensor fills which parameter, along which axes. And the table by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from moe_serve.base.model_config import FeedForward, ModelConfig
from moe_serve.base.registry import Registry
from moe_serve.model.partition import Axis

ARCHS = Registry(
    "architecture",
    "config.json: architectures",
    {
        "Qwen3MoeForCausalLM": "moe_serve.model.archs.qwen3_moe:spec",
        "Qwen2MoeForCausalLM": "moe_serve.model.archs.qwen2_moe:spec",
        "MixtralForCausalLM": "moe_serve.model.archs.mixtral:spec",
        "OlmoeForCausalLM": "moe_serve.model.archs.olmoe:spec",
    },
)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LayerKind = FeedForward | Literal["all"]


@dataclass(frozen=True, slots=True)
class Stacked:
    """A checkpoint tensor of all experts, (E, parts x rows, columns); the parameter is its `part`."""

    name: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True)
class WeightRule:
    """Fills `parameter` of the decoder from a checkpoint tensor with these `axes`.

    Names may hold {layer} and {expert}. `names` are alternatives that different generations of writers use;
    `stacked` further ones that hold all experts in one tensor. `layers`: the kind of feed-forward that has it.
    `float32`: kept so whatever the model's type.
    """

    parameter: str
    names: tuple[str, ...]
    axes: tuple[Axis, ...]
    stacked: tuple[Stacked, ...] = ()
    layers: LayerKind = "all"
    float32: bool = False

    def places(self, config: ModelConfig) -> Iterator[tuple[int | None, int | None]]:
        """The (layer, expert) pairs this rule stands for; None where its names do not ask for one."""
        layers: Sequence[int | None] = (None,)
        if "{layer}" in self.parameter:
            layers = range(config.num_layers) if self.layers == "all" else config.layers_with(self.layers)
        experts = range(config.num_experts) if "{expert}" in self.parameter else (None,)
        return ((layer, expert) for layer in layers for expert in experts)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What distinguishes an architecture beyond the numbers of its ModelConfig: where its weights come from.

    `ignored` endings of tensor names that carry no weights.
    """

    weights: tuple[WeightRule, ...]
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)


def find_spec(config: ModelConfig) -> ModelSpec:
    """The ModelSpec of a checkpoint's architecture."""
    make = cast(Callable[[ModelConfig], ModelSpec], ARCHS.load(config.architecture))
    return make(config)


def common_weights(config: ModelConfig) -> tuple[WeightRule, ...]:
    """What all supported architectures name alike: embeddings, norms and attention."""
    embedding: tuple[str, ...] = (EMBEDDING,)
    if config.tie_word_embeddings:
        embedding += (HEAD,)
    rules = [
        WeightRule("embedding.weight", embedding, ("vocab", "hidden")),
        WeightRule("norm.weight", ("model.norm.weight",), ("hidden",)),
        layer_rule("attention_norm.weight", "input_layernorm.weight", "hidden"),
        layer_rule("feed_forward_norm.weight", "post_attention_layernorm.weight", "hidden"),
        layer_rule("attention.q.weight", "self_attn.q_proj.weight", "heads", "hidden"),
        layer_rule("attention.k.weight", "self_attn.k_proj.weight", "kv_heads", "hidden"),
        layer_rule("attention.v.weight", "self_attn.v_proj.weight", "kv_heads", "hidden"),
        layer_rule("attention.o.weight", "self_attn.o_proj.weight", "hidden", "heads"),
    ]
    if not config.tie_word_embeddings:
        rules.append(WeightRule("head.weight", (HEAD,), ("vocab", "hidden")))
    if config.qkv_bias:
        rules += [
            layer_rule("attention.q.bias", "self_attn.q_proj.bias", "heads"),
            layer_rule("attention.k.bias", "self_attn.k_proj.bias", "kv_heads"),
            layer_rule("attention.v.bias", "self_attn.v_proj.bias", "kv_heads"),
        ]
    if config.o_bias:
        rules.append(layer_rule("attention.o.bias", "self_attn.o_proj.bias", "hidden"))
    return tuple(rules)


def expert_weights(gate: str, up: str, down: str, *, blocks: tuple[str, ...] = ("mlp",)) -> tuple[WeightRule, ...]:
    """Router and experts under model.layers.{layer}.BLOCK, one tensor per expert or stacked."""
    layers = [f"model.layers.{{layer}}.{block}" for block in blocks]

    def expert(part: str, name: str, axes: tuple[Axis, ...], stacked: str, index: int, parts: int) -> WeightRule:
        return WeightRule(
            f"layers.{{layer}}.experts.{{expert}}.{part}",
            tuple(f"{layer}.experts.{{expert}}.{name}.weight" for layer in layers),
            axes,
            tuple(Stacked(f"{layer}.experts.{stacked}", index, parts) for layer in layers),
            layers="moe",
        )

    return (
        WeightRule(
            "layers.{layer}.router.weight",
            tuple(f"{layer}.gate.weight" for layer in layers),
            ("experts", "hidden"),
            layers="moe",
            float32=True,
        ),
        expert("gate", gate, ("width", "hidden"), "gate_up_proj", 0, 2),
        expert("up", up, ("width", "hidden"), "gate_up_proj", 1, 2),
        expert("down", down, ("hidden", "width"), "down_proj", 0, 1),
    )


def dense_weights() -> tuple[WeightRule, ...]:
    """Of layers without experts."""
    return (
        layer_rule("dense.gate", "mlp.gate_proj.weight", "dense", "hidden", layers="dense"),
        layer_rule("dense.up", "mlp.up_proj.weight", "dense", "hidden", layers="dense"),
        layer_rule("dense.down", "mlp.down_proj.weight", "hidden", "dense", layers="dense"),
    )


def layer_rule(parameter: str, name: str, *axes: Axis, layers: LayerKind = "all") -> WeightRule:
    """A rule for a tensor that each layer (of a kind) has once."""
    return WeightRule(f"layers.{{layer}}.{parameter}", (f"model.layers.{{layer}}.{name}",), axes, layers=layers)
