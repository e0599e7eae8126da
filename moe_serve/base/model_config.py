"""What the checkpoint says: config.json and generation_config.json -> a frozen ModelConfig. Knows no torch.

Whatever changes the mathematics and is not computed here is refused by name. A field that config.json leaves out has
the default of base/architectures.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moe_serve.base.architectures import (
    ARCHITECTURES,
    DENSE_LAYER_FIELDS,
    HARMLESS,
    LIMITS,
    MAX_EXPERTS_OF_ALL_LAYERS,
    OF_MODEL_TYPE,
    Defaults,
    QKNorm,
)
from moe_serve.base.errors import CheckpointError
from moe_serve.base.fields import Fields, brief, read_object
from moe_serve.base.generation_config import sampling_defaults, unused_settings
from moe_serve.base.weight_files import stored_dtype

DTYPES = ("float32", "bfloat16", "float16")
FeedForward = Literal["moe", "dense"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Of what kinds a layer's two halves are."""

    attention: Literal["gqa"] = "gqa"
    feed_forward: FeedForward = "moe"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How a row's experts are chosen and weighted.

    `score` of all experts, of which the `top_k` largest are taken; then scaled to add up to one (`norm_topk_prob`),
    then all times `scale`. `num_groups` of neighbouring experts, of which a row takes some only
    (1: it may take any).
    """

    top_k: int
    score: Literal["softmax"] = "softmax"
    norm_topk_prob: bool = False
    scale: float = 1.0
    num_groups: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A checkpoint in numbers. `expert_size` is the width F of one routed expert, `dense_size` of a dense layer.

    `layers` in order. Experts are counted in MoE layers only: number m of them is layer `moe_layers[m]`.
    `qk_norm`: "head" norms each head's q and k by itself, "full" over all heads at once. `dtype` as saved.
    `eos_token_ids` from generation_config.json, else config.json; only ids inside the vocabulary.
    `generation_defaults` sampling options under SamplingParams' names. `notes`: sentences for the operator, who should
    hear each of them once.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    num_experts: int
    expert_size: int
    router: RouterConfig
    shared_expert_size: int | None = None
    dense_size: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: QKNorm = "none"
    tie_word_embeddings: bool = False
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    generation_defaults: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return self.layers_with("moe")

    @property
    def top_k(self) -> int:
        return self.router.top_k

    def layers_with(self, feed_forward: FeedForward) -> tuple[int, ...]:
        """Indices of the layers of one kind."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.feed_forward == feed_forward)


def load_model_config(folder: Path | str) -> ModelConfig:
    """Read a model folder's config.json (and generation_config.json if there); raises CheckpointError."""
    folder = Path(folder)
    if not folder.exists():
        raise CheckpointError(f"there is no model folder {folder} (option MODEL)")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; MODEL must name a folder in the Hugging Face layout")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; MODEL must name a folder in the Hugging Face layout")
    values = read_object(path)
    architecture = _architecture(path, values)
    defaults = ARCHITECTURES[architecture]
    fields = Fields(path, values, defaults.fields, LIMITS)
    _refuse_unsupported(fields, defaults)
    generation_path = folder / "generation_config.json"
    generation = read_object(generation_path) if generation_path.is_file() else {}
    return _build(architecture, fields, Fields(generation_path, generation, {}))


def _architecture(path: Path, values: Mapping[str, object]) -> str:
    """What architectures names; where it names nothing, what model_type means to transformers."""
    names = values.get("architectures") or [OF_MODEL_TYPE.get(str(values.get("model_type")))]
    supported = f"supported are: {', '.join(ARCHITECTURES)}"
    if not isinstance(names, list) or not isinstance(names[0], str):
        given = values.get("architectures")
        raise CheckpointError(f"{path}: architectures must name the model's class, not {brief(given)}; {supported}")
    if names[0] not in ARCHITECTURES:
        raise CheckpointError(f"{path}: architecture {names[0][:80]} is not supported; {supported}")
    meant = OF_MODEL_TYPE.get(str(values.get("model_type")), names[0])
    if meant != names[0]:
        raise CheckpointError(
            f"{path}: architectures says {names[0]}, but model_type {values['model_type']} is {meant}"
        )
    return names[0]


def _refuse_unsupported(fields: Fields, defaults: Defaults) -> None:
    computed = () if defaults.dense_size_field is None else DENSE_LAYER_FIELDS
    for name, harmless in HARMLESS.items():
        if name in computed:
            continue
        value = fields.values.get(name, harmless[0])
        if value not in harmless or (isinstance(value, bool) and not any(value is each for each in harmless)):
            raise CheckpointError(
                f"{fields.path}: {name} = {_brief(value)} is not supported"
                + (f"; supported: {', '.join(map(str, harmless))}" if harmless != (None,) else "")
            )
    layer_types = fields.values.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise CheckpointError(
            f"{fields.path}: layer_types = {_brief(layer_types)} is not supported; every layer must be full_attention"
        )
    for name in {"attention_bias", "qkv_bias"} - {defaults.bias_field}:
        if fields.flag(name):
            raise CheckpointError(f"{fields.path}: {name} = true is not supported for this architecture")
    _refuse_sliding_window(fields, switched=defaults.sliding_window_switch)


def _refuse_sliding_window(fields: Fields, *, switched: bool) -> None:
    """A window as long as the context changes nothing; the Qwens write one and switch it off elsewhere."""
    window = fields.values.get("sliding_window", 4096 if switched else None)
    if (switched and not fields.flag("use_sliding_window")) or window in (None, 0):
        return
    longest = fields.integer("max_position_embeddings")
    if isinstance(window, bool) or not isinstance(window, int) or window < longest:
        raise CheckpointError(
            f"{fields.path}: sliding_window = {brief(window)}, shorter than max_position_embeddings ({longest}), "
            "is not supported"
        )


def _brief(value: object) -> str:
    """As brief(), in JSON's spelling."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return brief(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _rope_theta(fields: Fields) -> float:
    """From rope_parameters (or rope_scaling) or from the top level; scaled kinds are refused by name."""
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.values.get(name)
        if not rope:
            continue
        if not isinstance(rope, dict):
            raise fields.wrong(name, rope, "an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{fields.path}: {name} of type {brief(kind)} is not supported; supported: default")
        if rope.get("partial_rotary_factor") not in (None, 1.0):
            raise CheckpointError(
                f"{fields.path}: partial_rotary_factor = {brief(rope['partial_rotary_factor'])} is not supported"
            )
        unknown = sorted(set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
        if unknown:
            raise CheckpointError(f"{fields.path}: {name} holds {', '.join(unknown)[:80]}, which is not supported")
        if rope.get("rope_theta") is not None:
            return Fields(fields.path, rope, {}).number("rope_theta")
        break  # rope_scaling, where it says something, goes over rope_parameters
    return fields.number("rope_theta")


def _dtype(fields: Fields) -> str:
    """As config.json says (dtype wins over torch_dtype), else as the weights are stored."""
    value = fields.raw("dtype") or fields.raw("torch_dtype") or stored_dtype(fields.path.parent) or "float32"
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in DTYPES:
        raise CheckpointError(f"{fields.path}: dtype {brief(value)} is not supported; supported: {', '.join(DTYPES)}")
    return str(name)


def _heads(fields: Fields, hidden: int, *, free_head_dim: bool) -> tuple[int, int, int]:
    """(query heads, KV heads, head dimension), each checked against the others."""
    heads = fields.integer("num_attention_heads")
    kv_heads = heads if fields.or_null("num_key_value_heads") is None else fields.integer("num_key_value_heads")
    if heads % kv_heads:
        raise CheckpointError(
            f"{fields.path}: num_key_value_heads ({kv_heads}) must divide num_attention_heads ({heads})"
        )
    given = fields.raw("head_dim") is not None
    if hidden % heads and not given:
        raise CheckpointError(f"{fields.path}: num_attention_heads ({heads}) must divide hidden_size ({hidden})")
    head_dim = fields.integer("head_dim") if given else hidden // heads
    if head_dim % 2:
        raise CheckpointError(f"{fields.path}: head_dim ({head_dim}) must be even for rotary positions")
    if not free_head_dim and head_dim * heads != hidden:
        raise CheckpointError(
            f"{fields.path}: head_dim ({head_dim}) x num_attention_heads ({heads}) must be hidden_size ({hidden})"
        )
    return heads, kv_heads, head_dim


def _layers(fields: Fields, defaults: Defaults) -> tuple[LayerSpec, ...]:
    """Dense are those of mlp_only_layers, and of the others all but every decoder_sparse_step-th."""
    count = fields.integer("num_hidden_layers")
    if defaults.dense_size_field is None:
        return (LayerSpec(),) * count
    given = fields.raw("mlp_only_layers")
    dense = [] if given is None else given
    if not isinstance(dense, list) or any(isinstance(index, bool) or not isinstance(index, int) for index in dense):
        raise fields.wrong("mlp_only_layers", dense, "a list of layers' numbers, the first being 0")
    step, without_experts = fields.integer("decoder_sparse_step"), set(dense)
    kinds: list[FeedForward] = ["dense" if i in without_experts or (i + 1) % step else "moe" for i in range(count)]
    if "moe" not in kinds:
        raise CheckpointError(
            f"{fields.path}: mlp_only_layers and decoder_sparse_step ({step}) leave none of {count} layers with "
            "experts; a model needs at least one"
        )
    return tuple(LayerSpec(feed_forward=kind) for kind in kinds)


def _router(fields: Fields, defaults: Defaults, num_experts: int) -> RouterConfig:
    top_k, normed = fields.integer("num_experts_per_tok"), defaults.norm_topk_prob
    if top_k > num_experts:
        raise CheckpointError(f"{fields.path}: num_experts_per_tok ({top_k}) is more than num_experts ({num_experts})")
    return RouterConfig(top_k=top_k, norm_topk_prob=fields.flag("norm_topk_prob") if normed is None else normed)


def _notes(folder: Path, generation: Fields) -> tuple[str, ...]:
    notes = [unused_settings(generation)]
    if (folder / "adapter_config.json").is_file():
        notes.append(f"{folder / 'adapter_config.json'}: adapters are not applied; merge this one into the weights")
    return tuple(note for note in notes if note)


def _dense_size(fields: Fields, defaults: Defaults, layers: tuple[LayerSpec, ...]) -> int | None:
    has_dense = any(layer.feed_forward == "dense" for layer in layers)
    return fields.integer(defaults.dense_size_field) if has_dense and defaults.dense_size_field else None


def _build(architecture: str, fields: Fields, generation: Fields) -> ModelConfig:
    defaults = ARCHITECTURES[architecture]
    hidden = fields.integer("hidden_size")
    heads, kv_heads, head_dim = _heads(fields, hidden, free_head_dim=defaults.free_head_dim)
    experts = fields.integer("num_experts", "num_local_experts")
    layers = _layers(fields, defaults)
    if experts * len(layers) > MAX_EXPERTS_OF_ALL_LAYERS:
        raise CheckpointError(
            f"{fields.path}: num_experts ({experts}) x num_hidden_layers ({len(layers)}) must be at most "
            f"{MAX_EXPERTS_OF_ALL_LAYERS}"
        )
    vocab_size = fields.integer("vocab_size")
    biased = defaults.bias_field is not None and fields.flag(defaults.bias_field)
    eos = generation.token_ids("eos_token_id") or fields.token_ids("eos_token_id")
    bos = generation.token_ids("bos_token_id") or fields.token_ids("bos_token_id")
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=_rope_theta(fields),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        num_experts=experts,
        expert_size=fields.integer(defaults.expert_size_field),
        router=_router(fields, defaults, experts),
        shared_expert_size=fields.integer("shared_expert_intermediate_size") if defaults.shared_expert else None,
        dense_size=_dense_size(fields, defaults, layers),
        qkv_bias=biased,
        o_bias=biased and defaults.output_bias,
        qk_norm=defaults.qk_norm,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        dtype=_dtype(fields),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(token for token in eos if 0 <= token < vocab_size),
        generation_defaults=sampling_defaults(generation),
        notes=_notes(fields.path.parent, generation),
    )
