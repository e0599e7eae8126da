"""Config: defaults, rules, what ranks must agree on, and that no option is silently ignored."""

from __future__ import annotations

import ast
import json
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from moe_serve.base.config import SECTIONS, Config, differing_fields
from moe_serve.base.eplb_config import EPLBConfig
from moe_serve.base.errors import ConfigError
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.base.tables import EXECUTORS

PACKAGE = Path(__file__).parents[2] / "moe_serve"
DEFAULTS = {
    "pipeline_parallel_size": 1,
    "tensor_parallel_size": 1,
    "data_parallel_size": 1,
    "data_parallel_size_local": None,
    "data_parallel_rank": None,
    "data_parallel_rank_local": None,
    "data_parallel_address": "127.0.0.1",
    "data_parallel_rpc_port": 29550,
    "data_parallel_master_port": 0,
    "data_parallel_backend": "mp",
    "data_parallel_external_lb": False,
    "data_parallel_hybrid_lb": False,
    "data_parallel_multi_port_external_lb": False,
    "data_parallel_supervisor_port": 9256,
    "data_parallel_start_rank": None,
    "node_rank": None,
    "headless": False,
    "start_timeout_seconds": 1800,
    "restart_world": False,
    "enable_expert_parallel": False,
    "enable_eplb": False,
    "expert_placement_strategy": "linear",
    "all2all_backend": "auto",
    "max_parallel_loading_workers": None,
    "disable_nccl_for_dp_synchronization": True,
    "enable_dbo": False,
    "dbo_decode_token_threshold": 32,
    "dbo_prefill_token_threshold": 512,
    "distributed_executor_backend": None,
    "decode_context_parallel_size": 1,
}


def test_defaults_are_those_the_field_knows() -> None:
    parallel = ParallelConfig()
    assert {name: getattr(parallel, name) for name in DEFAULTS} == DEFAULTS
    eplb = parallel.eplb_config
    assert (eplb.window_size, eplb.step_interval, eplb.num_redundant_experts) == (1000, 3000, 0)
    assert eplb.log_balancedness is False


def test_world_sizes() -> None:
    parallel = ParallelConfig(data_parallel_size=3, tensor_parallel_size=2)
    assert parallel.world_size == 2
    assert parallel.world_size_across_dp == 6


# --- rules ---------------------------------------------------------------------------------------------------------

EP = {"enable_expert_parallel": True}
DPM: dict[str, object] = {"data_parallel_multi_port_external_lb": True, "data_parallel_size": 4}
REFUSED: list[tuple[dict[str, object], str]] = [
    ({"tensor_parallel_size": 0}, "tensor_parallel_size: .*greater than or equal to 1.*given: 0"),
    ({"pipeline_parallel_size": -1}, "pipeline_parallel_size"),
    ({"data_parallel_size": 0}, "data_parallel_size"),
    (
        {"data_parallel_size_local": 3, "data_parallel_size": 2},
        r"data_parallel_size_local \(3\) must be at most .*\(2\)",
    ),
    ({"data_parallel_size_local": -1}, "data_parallel_size_local"),
    ({"data_parallel_rank": 2, "data_parallel_size": 2}, r"data_parallel_rank \(2\) must lie in \[0, 2\)"),
    ({"data_parallel_rank": -1}, "data_parallel_rank"),
    ({"data_parallel_rank_local": 2, "data_parallel_size": 2}, r"data_parallel_rank_local \(2\)"),
    ({"data_parallel_external_lb": True}, "data_parallel_size > 1"),
    ({"data_parallel_hybrid_lb": True}, "data_parallel_size > 1"),
    ({"data_parallel_external_lb": True, "data_parallel_size": 2}, "needs data_parallel_rank: which rank is this"),
    ({"data_parallel_hybrid_lb": True, "data_parallel_size": 2}, r"needs data_parallel_size_local.*\(given: None\)"),
    (
        {"data_parallel_hybrid_lb": True, "data_parallel_size": 3, "data_parallel_size_local": 2},
        r"a divisor of data_parallel_size \(3\)",
    ),
    (
        {
            **{"data_parallel_hybrid_lb": True, "data_parallel_size": 4},
            **{"data_parallel_size_local": 2, "data_parallel_start_rank": 1},
        },
        r"data_parallel_start_rank \(1\) must be a multiple of data_parallel_size_local \(2\)",
    ),
    ({"data_parallel_rank": 1, "data_parallel_size": 2, "headless": True}, "it goes with none of"),
    ({"data_parallel_rank": 1, "data_parallel_size": 2, "data_parallel_start_rank": 1}, "it goes with none of"),
    ({"data_parallel_size": 2, "data_parallel_size_local": 0}, "has nothing to do"),
    ({"data_parallel_size": 2, "headless": True}, "a node beside that of rank 0"),
    (
        {"data_parallel_size": 2, "data_parallel_start_rank": 1, "headless": True, "api_server_count": 2},
        r"api_server_count \(2\) does not go with headless",
    ),
    ({"api_server_count": 0}, r"api_server_count: .* greater than or equal to 1 \(given: 0\)"),
    ({"api_server_count": 65}, r"api_server_count: .* less than or equal to 64 \(given: 65\)"),
    (
        {"data_parallel_size": 2, "data_parallel_start_rank": 1},
        r"needs headless .*, data_parallel_hybrid_lb \(.* or data_parallel_multi_port_external_lb",
    ),
    (
        {"data_parallel_size": 4, "data_parallel_start_rank": 3, "data_parallel_size_local": 2, "headless": True},
        r"start_rank \(3\) and data_parallel_size_local \(2\) reach beyond data_parallel_size \(4\)",
    ),
    ({"node_rank": 1, "data_parallel_size": 4}, r"node_rank \(1\) needs data_parallel_size_local"),
    (
        {"node_rank": 1, "data_parallel_size": 4, "data_parallel_size_local": 2, "data_parallel_start_rank": 2},
        "give the one and leave out the other",
    ),
    (
        {**DPM, "node_rank": 2, "data_parallel_size_local": 2},
        r"start_rank \(4\) and data_parallel_size_local \(2\) reach beyond data_parallel_size \(4\)",
    ),
    ({"data_parallel_supervisor_port": 9000}, "needs data_parallel_multi_port_external_lb"),
    ({**DPM, "data_parallel_size": 1}, "data_parallel_multi_port_external_lb needs data_parallel_size > 1"),
    *(
        ({**DPM, name: value}, f"does not go with {name}; leave that out")
        for name, value in {
            "headless": True,
            "data_parallel_rank": 1,
            "data_parallel_external_lb": True,
            "data_parallel_hybrid_lb": True,
        }.items()
    ),
    ({**DPM, "port": 65533}, r"port \(65533\) is the first of 4.*; give one up to 65532"),
    ({**DPM, "port": 0}, r"port \(0\) and data_parallel_supervisor_port \(9256\) must be known beforehand"),
    ({**DPM, "data_parallel_supervisor_port": 0}, "must be known beforehand"),
    ({**DPM, "port": 9253}, r"supervisor_port \(9256\) lies among the ports of this node's ranks, 9253 to 9256"),
    ({"start_timeout_seconds": 0}, "start_timeout_seconds"),
    ({"data_parallel_address": " "}, "data_parallel_address must not be empty"),
    ({"data_parallel_rpc_port": 65536}, "data_parallel_rpc_port"),
    ({"data_parallel_master_port": -1}, "data_parallel_master_port"),
    ({"data_parallel_backend": "threads"}, "data_parallel_backend.*'mp' or 'ray'"),
    ({"enable_eplb": True, "data_parallel_size": 2}, "enable_eplb needs enable_expert_parallel"),
    ({"enable_eplb": True, **EP}, "data_parallel_size x tensor_parallel_size > 1"),
    ({"eplb_config": {"num_redundant_experts": 2}}, r"num_redundant_experts \(2\) needs enable_eplb"),
    ({"eplb_config": {"num_redundant_experts": -1}}, "eplb_config.num_redundant_experts"),
    ({"eplb_config": {"window_size": 0}}, "eplb_config.window_size"),
    ({"eplb_config": {"step_interval": 0}}, "eplb_config.step_interval"),
    ({"eplb_config": {"window": 5}}, "eplb_config.window"),
    ({"expert_placement_strategy": "random"}, "'linear' or 'round_robin'"),
    ({"expert_placement_strategy": "round_robin"}, "needs enable_expert_parallel"),
    ({"decode_context_parallel_size": 2}, r"decode_context_parallel_size \(2\) must divide tensor_parallel_size \(1\)"),
    ({"max_parallel_loading_workers": 0}, "max_parallel_loading_workers"),
    ({"dbo_decode_token_threshold": 0}, "dbo_decode_token_threshold"),
    ({"enable_dbo": True}, "enable_dbo needs data_parallel_size x tensor_parallel_size > 1"),
    ({"dtype": "int4"}, "dtype: .*'auto', 'float32', 'bfloat16' or 'float16' .*'int4'"),
    ({"device": "tpu"}, "device: .*'auto', 'cpu' or 'cuda'"),
    ({"max_model_len": 0}, "max_model_len"),
    ({"served_model_name": ""}, "served_model_name"),
    ({"block_size": 0}, "block_size"),
    ({"gpu_memory_utilization": 0}, "gpu_memory_utilization"),
    ({"gpu_memory_utilization": 1.1}, "gpu_memory_utilization"),
    ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes"),
    (
        {"max_num_seqs": 64, "max_num_batched_tokens": 32},
        r"max_num_batched_tokens \(32\) must be at least max_num_seqs",
    ),
    ({"step_timeout_seconds": 0}, "step_timeout_seconds"),
    ({"step_timeout_seconds": "nan"}, "step_timeout_seconds"),
    ({"step_timeout_seconds": "inf"}, "step_timeout_seconds"),
    ({"shutdown_timeout": -1}, "shutdown_timeout"),
    ({"port": 65536}, "port"),
    ({"api_key": ""}, "api_key"),
    ({"max_body_bytes": 0}, "max_body_bytes"),
    ({"log_level": "loud"}, "log_level"),
    ({"no_such_option": 1}, "unknown option no_such_option; known are: .*tensor_parallel_size"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_what_cannot_be_is_refused_with_what_was_given_and_what_is_allowed(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_flat(options)


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_flat({"port": -1, "block_size": 0})
    assert "port" in str(caught.value)
    assert "block_size" in str(caught.value)


def test_a_small_token_budget_alone_lowers_the_number_of_sequences() -> None:
    assert Config.from_flat({"max_num_batched_tokens": 64}).scheduler.max_num_seqs == 64
    assert Config.from_flat({"max_num_batched_tokens": 4096}).scheduler.max_num_seqs == 128


def test_options_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().parallel.data_parallel_size = 2


# --- ports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "coordinator", "store"),
    [
        ({}, 0, 0),
        ({"data_parallel_size": 4}, 0, 0),
        ({"data_parallel_address": "127.0.0.1"}, 29550, 0),
        ({"data_parallel_master_ip": "127.0.0.1"}, 29550, 0),
        ({"data_parallel_rank": 0, "data_parallel_size": 2}, 29550, 0),
        ({"data_parallel_size": 2, "data_parallel_size_local": 1}, 29550, 0),
        (DPM, 29550, 0),
        ({"data_parallel_rpc_port": 5000}, 5000, 0),
        ({"data_parallel_master_port": 5001}, 0, 5001),
    ],
    ids=str,
)
def test_the_coordinators_port_is_known_beforehand_only_where_somebody_else_must_know_it(
    options: dict[str, object], coordinator: int, store: int
) -> None:
    parallel = Config.from_flat(options).parallel
    assert (parallel.coordinator_port, parallel.data_parallel_master_port) == (coordinator, store)
    told = Config.model_validate_json(Config.from_flat(options).to_json()).parallel
    assert (told.coordinator_port, told.data_parallel_master_port) == (coordinator, store)


PARTS: list[tuple[dict[str, object], tuple[int, ...], str, int]] = [
    ({}, (0, 1, 2, 3), "internal", 1),
    ({"data_parallel_rank": 2}, (2,), "external", 4),
    ({"data_parallel_rank": 2, "data_parallel_external_lb": True}, (2,), "external", 4),
    ({"data_parallel_hybrid_lb": True, "data_parallel_size_local": 2}, (0, 1), "hybrid", 2),
    (
        {"data_parallel_hybrid_lb": True, "data_parallel_size_local": 2, "data_parallel_start_rank": 2},
        (2, 3),
        "hybrid",
        2,
    ),
    (DPM, (0, 1, 2, 3), "external", 4),
    ({**DPM, "data_parallel_start_rank": 1, "data_parallel_size_local": 3}, (1, 2, 3), "external", 4),
    ({**DPM, "node_rank": 1, "data_parallel_size_local": 2}, (2, 3), "external", 4),
    ({"headless": True, "node_rank": 1, "data_parallel_size_local": 2}, (2, 3), "internal", 1),
    ({"data_parallel_size_local": 3}, (0, 1, 2), "internal", 1),
    ({"headless": True, "data_parallel_start_rank": 1, "data_parallel_size_local": 2}, (1, 2), "internal", 1),
    ({"headless": True, "data_parallel_start_rank": 3}, (3,), "internal", 1),
]


@pytest.mark.parametrize(("options", "ranks", "balancing", "frontends"), PARTS, ids=str)
def test_which_ranks_a_node_starts_and_who_spreads_requests(
    options: dict[str, object], ranks: tuple[int, ...], balancing: str, frontends: int
) -> None:
    parallel = Config.from_flat({"data_parallel_size": 4, **options}).parallel
    assert parallel.dp_ranks_here == ranks
    assert parallel.load_balancing == balancing
    assert parallel.num_frontends == frontends
    assert parallel.is_apart == (len(ranks) < 4)
    parallel.check_built()


# --- agreement -----------------------------------------------------------------------------------------------------


def test_the_hash_is_stable_and_ignores_what_ranks_may_have_of_their_own() -> None:
    assert (
        Config().compute_hash() == Config.from_flat({"port": 1234, "host": "::", "log_level": "debug"}).compute_hash()
    )
    assert Config().compute_hash() == Config.from_flat({"block_size": 16, "data_parallel_rpc_port": 99}).compute_hash()
    assert len(Config().compute_hash()) == 64


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 32},
        {"data_parallel_size": 2},
        {"tensor_parallel_size": 2},
        {"enable_expert_parallel": True},
        {"all2all_backend": "naive"},
        {"expert_placement_strategy": "round_robin", **EP},
        {"model": "other"},
        {"dtype": "float32"},
        {"load_format": "dummy"},
        {"max_model_len": 99},
        {"max_num_batched_tokens": 4096},
        {"step_timeout_seconds": 5},
        {"enable_prefix_caching": False},
        {"enable_eplb": True, "data_parallel_size": 2, **EP},
        {"eplb_config": {"window_size": 7}},
    ],
    ids=str,
)
def test_what_must_agree_changes_the_hash(options: dict[str, object]) -> None:
    assert Config().compute_hash() != Config.from_flat(options).compute_hash()


def test_differences_are_told_by_field_with_both_values() -> None:
    mine, theirs = Config(), Config.from_flat({"block_size": 32, "all2all_backend": "naive", "port": 1})
    assert differing_fields(mine.agreement(), theirs.agreement()) == [
        'all2all_backend: "naive", not "auto"',
        "block_size: 32, not 16",
    ]
    assert differing_fields(mine.agreement(), mine.agreement()) == []
    assert differing_fields({"a": "1"}, {}) == ["a: unknown, not 1"]


# --- travelling ----------------------------------------------------------------------------------------------------


def test_a_config_arrives_in_another_process_as_it_left_its_keys_only_where_they_are_needed() -> None:
    config = Config.from_flat({"api_key": "sesame", "port": 81, "eplb_config": {"window_size": 3}, "model": "/m"})
    arrived = Config.model_validate_json(config.to_json(keys=True))
    assert arrived == config
    assert arrived.server.api_key is not None
    assert arrived.server.api_key.get_secret_value() == "sesame"
    assert arrived.server.model_fields_set == {"api_key", "port"}
    elsewhere = Config.model_validate_json(config.to_json())
    assert elsewhere.server.api_key is None
    assert elsewhere == config.with_("server", api_key=None)


def test_a_config_does_not_show_its_secret_unless_asked() -> None:
    config = Config.from_flat({"api_key": "sesame"})
    assert "sesame" not in repr(config)
    assert "sesame" not in config.model_dump_json()


def test_with_changes_one_section_and_checks_it_again() -> None:
    config = Config.from_flat({"data_parallel_size": 2, "port": 81})
    changed = config.with_("parallel", tensor_parallel_size=2)
    assert (changed.parallel.data_parallel_size, changed.parallel.tensor_parallel_size) == (2, 2)
    assert changed.parallel.model_fields_set == {"data_parallel_size", "tensor_parallel_size"}
    assert changed.server == config.server
    with pytest.raises(ValueError, match="must divide"):
        config.with_("parallel", decode_context_parallel_size=2)


# --- nothing is silently ignored -----------------------------------------------------------------------------------

NEEDS: dict[str, dict[str, object]] = {
    "data_parallel_size_local": {"data_parallel_size": 4},
    "data_parallel_rank": {"data_parallel_size": 4},
    "data_parallel_rank_local": {"data_parallel_size": 4},
    "data_parallel_external_lb": {"data_parallel_size": 2},
    "data_parallel_hybrid_lb": {"data_parallel_size": 2},
    "data_parallel_multi_port_external_lb": {"data_parallel_size": 2},
    "data_parallel_supervisor_port": {"data_parallel_multi_port_external_lb": True, "data_parallel_size": 2},
    "node_rank": {"data_parallel_size": 4, "data_parallel_size_local": 2, "headless": True},
    "enable_eplb": {"data_parallel_size": 2, **EP},
    "num_redundant_experts": {"enable_eplb": True, "data_parallel_size": 2, **EP},
    "decode_context_parallel_size": {"tensor_parallel_size": 4},
    "enable_dbo": {"data_parallel_size": 2},
}
"""What else must be said for an option to be possible at all."""


def all_fields() -> list[tuple[str, str]]:
    """(section, field), those of the nested section too."""
    flat = [(section, field) for section, kind in SECTIONS.items() for field in kind.model_fields]
    return flat + [("eplb_config", field) for field in EPLBConfig.model_fields]


@cache
def fields_read() -> set[tuple[str, str]]:
    """(section, field) of every `config.section.field` or `section.field` in the package outside the sections; what
    a property of ParallelConfig is made of is read where the property is."""
    found: set[tuple[str, str]] = set()
    for path in PACKAGE.rglob("*.py"):
        if path not in (PACKAGE / "base" / "config.py", PACKAGE / "base" / "parallel_config.py"):
            found |= attributes_in(ast.parse(path.read_text()))
    before = 0
    while len(found) > before:  # a property may be made of others
        before = len(found)
        for made in properties_of_parallel_config():
            if ("parallel", made.name) in found:
                found |= {("parallel", field) for owner, field in attributes_in(made) if owner == "self"}
    return found


def attributes_in(tree: ast.AST) -> set[tuple[str, str]]:
    """(a, b) for every `a.b` and `x.a.b`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute | ast.Name):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else node.value.id
            found.add((owner, node.attr))
    return found


def properties_of_parallel_config() -> Iterator[ast.FunctionDef]:
    tree = ast.parse((PACKAGE / "base" / "parallel_config.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == "ParallelConfig":
            yield from (inner for inner in node.body if isinstance(inner, ast.FunctionDef))


def other_value(info: FieldInfo) -> Any:
    """A value of the field's type that is not its default."""
    kinds = [kind for kind in get_args(info.annotation) if kind is not type(None)]
    optional = get_origin(info.annotation) in (Union, types.UnionType)
    kind = kinds[0] if optional else info.annotation
    if get_origin(kind) is Literal:
        return next(value for value in get_args(kind) if value != info.default)
    if kind is bool:
        return not info.default
    if kind is str:
        return "ray"
    return (info.default or 0) + 1


def is_refused(section: str, field: str) -> bool:
    """Whether start-up refuses the field's other value with a sentence that says that this is not built."""
    info = (EPLBConfig if section == "eplb_config" else SECTIONS[section]).model_fields[field]
    value = other_value(info)
    asked: dict[str, object] = {"eplb_config": {field: value}} if section == "eplb_config" else {field: value}
    config = Config.from_flat(asked | NEEDS.get(field, {}))
    try:
        config.parallel.check_built()
    except ConfigError as error:
        return "not built" in str(error)
    return False


@pytest.mark.parametrize(("section", "field"), all_fields())
def test_every_option_is_read_somewhere_or_refused(section: str, field: str) -> None:
    assert (section, field) in fields_read() or is_refused(section, field), f"{section}.{field} is silently ignored"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"disable_nccl_for_dp_synchronization": False},
            "disable_nccl_for_dp_synchronization=False is not built: .* gloo.*leave out --no-disable-nccl",
        ),
        ({"distributed_executor_backend": "thread"}, "unknown executor 'thread'; known are: uni, mp"),
        ({"distributed_executor_backend": "uni", "tensor_parallel_size": 2}, "uni holds one rank.*use mp"),
        ({"all2all_backend": "carrier_pigeon"}, "unknown all2all backend 'carrier_pigeon'; known are: naive"),
    ],
    ids=str,
)
def test_what_is_not_built_yet_is_refused_by_a_sentence_that_says_so(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_flat(options).parallel.check_built()


def test_a_class_path_may_be_written_with_a_dot_or_a_colon() -> None:
    for path in ("package.module.Class", "package.module:Class"):
        parallel = Config.from_flat({"distributed_executor_backend": path}).parallel
        assert parallel.distributed_executor_backend == "package.module:Class"
        parallel.check_built()
    assert "package.module:Class" not in EXECUTORS.names()


def test_agreement_is_json_by_field() -> None:
    for value in Config().agreement().values():
        json.loads(value)
