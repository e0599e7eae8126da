"""config.json and generation_config.json in the spellings of both generations; transformers is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_serve.base.architectures import ARCHITECTURES, OF_MODEL_TYPE
from moe_serve.base.errors import CheckpointError
from moe_serve.base.model_config import ModelConfig, RouterConfig, load_model_config
from tests.support.tiny_model import ARCHS, tiny_config

CLASSES = dict(zip(ARCHS, ARCHITECTURES, strict=True))
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "num_local_experts": 10,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "rope_theta": 1000.0,
}
QWEN2 = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def write(folder: Path, config: object, generation: object = None) -> Path:
    folder.joinpath("config.json").write_text(json.dumps(config))
    if generation is not None:
        folder.joinpath("generation_config.json").write_text(json.dumps(generation))
    return folder


def load(folder: Path, config: object, generation: object = None) -> ModelConfig:
    return load_model_config(write(folder, config, generation))


def numbers_of(oracle: Any) -> dict[str, object]:
    """The same numbers read off a transformers config."""
    head_dim = getattr(oracle, "head_dim", None) or oracle.hidden_size // oracle.num_attention_heads
    rope = oracle.rope_parameters
    return {
        "vocab_size": oracle.vocab_size,
        "hidden_size": oracle.hidden_size,
        "num_layers": oracle.num_hidden_layers,
        "num_heads": oracle.num_attention_heads,
        "num_kv_heads": oracle.num_key_value_heads,
        "head_dim": head_dim,
        "rms_norm_eps": oracle.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "max_position_embeddings": oracle.max_position_embeddings,
        "num_experts": getattr(oracle, "num_experts", None) or oracle.num_local_experts,
        "expert_size": getattr(oracle, "moe_intermediate_size", oracle.intermediate_size),
        "router": RouterConfig(
            top_k=oracle.num_experts_per_tok, norm_topk_prob=getattr(oracle, "norm_topk_prob", True)
        ),
        "shared_expert_size": getattr(oracle, "shared_expert_intermediate_size", None),
        "tie_word_embeddings": oracle.tie_word_embeddings,
    }


def assert_agree(config: ModelConfig, oracle: Any) -> None:
    for name, value in numbers_of(oracle).items():
        assert getattr(config, name) == value, name


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_writes_is_read_with_the_same_numbers(arch: str, tied: bool, tmp_path: Path) -> None:
    oracle = tiny_config(arch, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    oracle.architectures = [CLASSES[arch]]
    oracle.save_pretrained(tmp_path)
    assert_agree(load_model_config(tmp_path), oracle)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_field_that_is_left_out_has_the_value_transformers_gives_it(arch: str, tmp_path: Path) -> None:
    write(tmp_path, {"architectures": [CLASSES[arch]], "model_type": arch})
    assert_agree(load_model_config(tmp_path), AutoConfig.from_pretrained(tmp_path))


# What says nothing of the mathematics, or what this package and transformers both need.
NEEDED = {"architectures", "model_type"}


def full_config(arch: str, folder: Path) -> dict[str, Any]:
    """A config.json in which every field that is read differs from its default."""
    oracle = tiny_config(
        arch,
        tie_word_embeddings=True,
        hidden_size=512,
        num_attention_heads=32,
        num_key_value_heads=2,
        rms_norm_eps=3e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
        **({"head_dim": 16} if arch == "olmoe" else {"head_dim": 8}),
        **({} if arch == "mixtral" else {"norm_topk_prob": True}),
        **({"qkv_bias": False} if arch == "qwen2_moe" else {}),
        **({"attention_bias": True} if arch in ("qwen3_moe", "olmoe") else {}),
        **({"mlp_only_layers": [1], "intermediate_size": 44} if arch.startswith("qwen") else {}),
    )
    oracle.architectures = [CLASSES[arch]]
    oracle.save_pretrained(folder)
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Those of transformers' model of the folder."""
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(AutoConfig.from_pretrained(folder))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def assert_same_model(folder: Path) -> None:
    """Numbers and shapes: head_dim, biases and layers are not in transformers' configs alone."""
    config, oracle, shapes = load_model_config(folder), AutoConfig.from_pretrained(folder), shapes_of(folder)
    assert_agree(config, oracle)
    q, k = (shapes[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")
    assert (q, k) == (
        (config.num_heads * config.head_dim, config.hidden_size),
        (config.num_kv_heads * config.head_dim, config.hidden_size),
    )
    assert config.qkv_bias == ("model.layers.0.self_attn.q_proj.bias" in shapes)
    assert config.o_bias == ("model.layers.0.self_attn.o_proj.bias" in shapes)
    assert config.tie_word_embeddings == ("lm_head.weight" not in shapes)
    dense = [i for i in range(config.num_layers) if f"model.layers.{i}.mlp.gate_proj.weight" in shapes]
    assert [i for i in range(config.num_layers) if i not in config.moe_layers] == dense
    eos = oracle.eos_token_id
    ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    assert config.eos_token_ids == tuple(token for token in ids if token < config.vocab_size)
    assert config.bos_token_id == oracle.bos_token_id
    assert config.dtype == str(oracle.dtype or "float32").removeprefix("torch.")


@pytest.mark.parametrize("arch", ARCHS)
def test_each_field_left_out_or_null_means_what_it_means_to_transformers(arch: str, tmp_path: Path) -> None:
    values = full_config(arch, tmp_path)
    assert_same_model(tmp_path)
    compared = 0
    for name in sorted(values.keys() - NEEDED):
        left = {key: value for key, value in values.items() if key != name}
        for changed in (left, left | {name: None}):
            write(tmp_path, changed)
            try:
                shapes_of(tmp_path)
            except Exception:  # noqa: BLE001 (whatever transformers says: it does not load this)
                continue
            try:
                load_model_config(tmp_path)
            except CheckpointError as error:
                # What we refuse although transformers loads it is refused by name.
                assert name in ("hidden_act", "hidden_size", "num_attention_heads", "head_dim"), error  # noqa: PT017
                continue
            assert_same_model(tmp_path)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize("arch", ARCHS)
def test_a_config_without_architectures_is_what_its_model_type_says(arch: str, tmp_path: Path) -> None:
    assert set(OF_MODEL_TYPE.values()) == set(ARCHITECTURES)
    values = full_config(arch, tmp_path)
    expected = load_model_config(tmp_path)
    for names in ({}, {"architectures": None}, {"architectures": []}):
        rest = {key: value for key, value in values.items() if key != "architectures"}
        assert load(tmp_path, rest | names) == expected


def test_an_architecture_of_another_model_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="MixtralForCausalLM, but model_type olmoe is OlmoeForCausalLM"):
        load(tmp_path, MIXTRAL | {"model_type": "olmoe"})


ROPES: list[dict[str, Any]] = [
    {"rope_theta": 5e5},
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
    {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
    {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 6e5}},
    {"rope_theta": 5e5, "rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 6e5}},
    {"rope_scaling": {"type": "default", "rope_theta": 7e5}, "rope_parameters": {"rope_theta": 6e5}},
    {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 6e5}},
    {"rope_scaling": {}, "rope_parameters": {"rope_theta": 6e5}},
    {"rope_parameters": None},
    {},
]


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_base_of_rotary_positions_is_taken_from_where_transformers_takes_it(
    arch: str, rope: dict[str, Any], tmp_path: Path
) -> None:
    values = full_config(arch, tmp_path)
    write(tmp_path, {key: value for key, value in values.items() if not key.startswith("rope")} | rope)
    assert load_model_config(tmp_path).rope_theta == AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"]


@pytest.mark.parametrize("arch", ARCHS)
def test_an_older_spelling_means_what_transformers_makes_of_it(arch: str, tmp_path: Path) -> None:
    values = MIXTRAL | {
        "architectures": [CLASSES[arch]],
        "model_type": arch,
        "torch_dtype": "bfloat16",
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
    }
    if arch != "mixtral":
        values["num_experts"] = values.pop("num_local_experts")
        values["norm_topk_prob"] = True
    config = load(tmp_path, values)
    assert_agree(config, AutoConfig.from_pretrained(tmp_path))
    assert (config.rope_theta, config.num_experts, config.dtype) == (1000.0, 10, "bfloat16")


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_has_two_spellings(name: str, tmp_path: Path) -> None:
    values = {key: value for key, value in MIXTRAL.items() if key != "num_local_experts"}
    assert load(tmp_path, values | {name: 6}).num_experts == 6


def test_two_spellings_that_disagree_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="num_experts and num_local_experts differ"):
        load(tmp_path, MIXTRAL | {"num_experts": 9})


def test_an_architecture_fixes_what_its_code_fixes(tmp_path: Path) -> None:
    def traits(name: str, **more: object) -> tuple[object, ...]:
        config = load(tmp_path, {"architectures": [name], **more})
        return config.qk_norm, config.qkv_bias, config.o_bias, config.router.norm_topk_prob

    assert traits("Qwen3MoeForCausalLM") == ("head", False, False, False)
    assert traits("Qwen3MoeForCausalLM", attention_bias=True) == ("head", True, True, False)
    assert traits("Qwen2MoeForCausalLM") == ("none", True, False, False)
    assert traits("Qwen2MoeForCausalLM", qkv_bias=False) == ("none", False, False, False)
    assert traits("MixtralForCausalLM", norm_topk_prob=False) == ("none", False, False, True)
    assert traits("OlmoeForCausalLM", norm_topk_prob=True) == ("full", False, False, True)
    assert traits("OlmoeForCausalLM", attention_bias=True) == ("full", True, True, False)


UNSUPPORTED: list[tuple[dict[str, object], str]] = [
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"compression_config": {"format": "int-quantized"}}, "compression_config"),
    ({"clip_qkv": 8.0}, "clip_qkv"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"hidden_act": None}, "hidden_act"),
    ({"mlp_only_layers": [0]}, "mlp_only_layers"),
    ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ({"decoder_sparse_step": True}, "decoder_sparse_step"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"attention_chunk_size": 128}, "attention_chunk_size"),
    ({"is_causal": False}, "is_causal"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ({"routed_scaling_factor": 2.5}, "routed_scaling_factor"),
    ({"scoring_func": "sigmoid"}, "scoring_func"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"attention_bias": True}, "attention_bias"),
    ({"qkv_bias": True}, "qkv_bias"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "of type 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'linear'"),
    (
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
        "rope_parameters of type 'llama3'",
    ),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [8, 8]}}, "mrope_section"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    ({"rope_parameters": "default"}, "rope_parameters"),
    ({"sliding_window": 128}, "sliding_window = 128"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
]


@pytest.mark.parametrize(("fields", "named"), UNSUPPORTED, ids=lambda value: json.dumps(value)[:60])
def test_a_field_that_changes_the_mathematics_is_refused_by_name(
    fields: dict[str, object], named: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, MIXTRAL | fields)
    assert named in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": None, "clip_qkv": None, "mlp_only_layers": [], "decoder_sparse_step": 1},
        {"hidden_act": "silu", "rope_scaling": None, "sliding_window": None},
        {"rope_scaling": {"type": "default"}, "partial_rotary_factor": 1.0},
        {"sliding_window": 512, "layer_types": ["full_attention", "full_attention"]},
        {"attention_dropout": 0.1, "router_jitter_noise": 0.1, "initializer_range": 0.5, "use_cache": False},
    ],
)
def test_a_field_that_changes_nothing_is_accepted(fields: dict[str, object], tmp_path: Path) -> None:
    assert load(tmp_path, MIXTRAL | fields) == load(tmp_path, MIXTRAL)


def test_a_sliding_window_of_a_qwen_counts_only_if_it_is_switched_on(tmp_path: Path) -> None:
    load(tmp_path, QWEN2 | {"sliding_window": 128, "use_sliding_window": False, "max_window_layers": 1})
    load(tmp_path, QWEN2 | {"sliding_window": 128})
    with pytest.raises(CheckpointError, match="sliding_window = 128"):
        load(tmp_path, QWEN2 | {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 1})


@pytest.mark.parametrize("dense", [[], [0], [2, 4], [5, 17]])
@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("arch", ["qwen2_moe", "qwen3_moe"])
def test_layers_are_dense_where_transformers_makes_them_so(
    arch: str, step: int, dense: list[int], tmp_path: Path
) -> None:
    oracle = tiny_config(arch, num_hidden_layers=6, mlp_only_layers=dense, decoder_sparse_step=step)
    oracle.architectures = [CLASSES[arch]]
    oracle.save_pretrained(tmp_path)
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        layers = auto.from_config(oracle).model.layers
    config = load_model_config(tmp_path)
    with_experts = [index for index, layer in enumerate(layers) if hasattr(layer.mlp, "experts")]
    assert list(config.moe_layers) == with_experts
    assert config.num_layers == 6
    is_mixed = len(with_experts) < 6
    assert config.dense_size == (oracle.intermediate_size if is_mixed else None)


@pytest.mark.parametrize("arch", ["qwen2_moe", "qwen3_moe"])
def test_a_dense_width_that_is_left_out_is_the_one_of_transformers(arch: str, tmp_path: Path) -> None:
    write(tmp_path, {"architectures": [CLASSES[arch]], "model_type": arch, "mlp_only_layers": [3]})
    assert load_model_config(tmp_path).dense_size == AutoConfig.from_pretrained(tmp_path).intermediate_size


WRONG_LAYERS: list[tuple[dict[str, object], str]] = [
    ({"mlp_only_layers": 0}, "mlp_only_layers must be a list"),
    ({"mlp_only_layers": ["0"]}, "mlp_only_layers must be a list"),
    ({"mlp_only_layers": [True]}, "mlp_only_layers must be a list"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer of at least 1"),
    ({"decoder_sparse_step": True}, "decoder_sparse_step must be an integer of at least 1"),
    ({"mlp_only_layers": [0, 1]}, "leave none of 2 layers with experts"),
    ({"decoder_sparse_step": 3}, "leave none of 2 layers with experts"),
    ({"mlp_only_layers": [1], "intermediate_size": "45"}, "intermediate_size"),
]


@pytest.mark.parametrize(("fields", "named"), WRONG_LAYERS, ids=lambda value: str(value)[:60])
def test_a_list_of_layers_that_means_nothing_is_refused_by_name(
    fields: dict[str, object], named: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, QWEN2 | {"num_hidden_layers": 2} | fields)
    assert named in str(caught.value)


BROKEN: list[tuple[dict[str, object], str]] = [
    ({"hidden_size": "64"}, "hidden_size must be an integer of at least 1, not '64'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_attention_heads": True}, "num_attention_heads"),
    ({"num_key_value_heads": 3}, "num_key_value_heads (3) must divide num_attention_heads (4)"),
    ({"num_attention_heads": 5, "num_key_value_heads": 5}, "must divide hidden_size"),
    ({"head_dim": 7}, "head_dim (7) must be even"),
    ({"num_experts_per_tok": 11}, "num_experts_per_tok (11) is more than num_experts (10)"),
    ({"rms_norm_eps": -1}, "rms_norm_eps must be a number greater than 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rope_theta": float("inf")}, "rope_theta"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ({"eos_token_id": [2, "3"]}, "eos_token_id must be a token id or a list of them"),
    ({"dtype": 16}, "dtype 16"),
]


@pytest.mark.parametrize(("fields", "named"), BROKEN, ids=lambda value: str(value)[:60])
def test_a_field_of_the_wrong_type_or_range_is_named(fields: dict[str, object], named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, MIXTRAL | fields)
    assert named in str(caught.value)


def test_olmoe_ties_the_head_dimension_to_the_hidden_size(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be hidden_size"):
        load(tmp_path, MIXTRAL | {"architectures": ["OlmoeForCausalLM"], "head_dim": 32})


def test_a_folder_that_is_no_model_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no model folder .*nowhere"):
        load_model_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_model_config(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_model_config(file)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\ufffd", '{"a": }'])
def test_a_config_that_is_not_a_json_object_is_refused(text: str, tmp_path: Path) -> None:
    tmp_path.joinpath("config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model_config(tmp_path)
    tmp_path.joinpath("config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model_config(tmp_path)


@pytest.mark.parametrize("names", [None, [], "MixtralForCausalLM", [3], ["LlamaForCausalLM"]])
def test_an_unsupported_architecture_is_answered_with_the_supported_ones(names: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, MIXTRAL | {"architectures": names})
    for name in ARCHITECTURES:
        assert name in str(caught.value)


def test_generation_defaults_and_end_tokens_come_from_generation_config(tmp_path: Path) -> None:
    generation = {"eos_token_id": [5, 7, 999], "bos_token_id": 3, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    config = load(tmp_path, MIXTRAL | {"eos_token_id": 2}, generation | {"do_sample": True})
    assert config.eos_token_ids == (5, 7)
    assert config.bos_token_id == 3
    assert config.generation_defaults == {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
    assert load(tmp_path, MIXTRAL, {"do_sample": False, "temperature": 0.7}).generation_defaults["temperature"] == 0.0


def test_end_tokens_come_from_config_where_generation_config_has_none(tmp_path: Path) -> None:
    assert load(tmp_path, MIXTRAL | {"eos_token_id": [2, 4]}, {"temperature": 1.0}).eos_token_ids == (2, 4)
    assert load(tmp_path, MIXTRAL | {"architectures": ["Qwen3MoeForCausalLM"]}, {}).eos_token_ids == ()


def test_a_broken_generation_config_is_named(tmp_path: Path) -> None:
    write(tmp_path, MIXTRAL).joinpath("generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read"):
        load_model_config(tmp_path)
