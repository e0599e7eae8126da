"""What the operator says: frozen sections with defaults and rules. Flags, environment, YAML and docs come from here.

A rule that stands alone is a validator; what depends on the checkpoint or the device is settled once by
`resolve()` (in `launch/resolve.py` for the node, in the worker for the device), after which nothing is "auto".
Knows no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from moe_serve.base.errors import ConfigError
from moe_serve.base.registry import Registry
from moe_serve.base.topology import Topology

ALL2ALL = Registry(
    "all2all backend",
    "--all2all-backend",
    {
        "naive": "moe_serve.model.all2all.naive:Naive",
        "allgather_reducescatter": "moe_serve.model.all2all.allgather_reducescatter:AllGatherReduceScatter",
        "torch_a2a": "moe_serve.model.all2all.torch_a2a:TorchAllToAll",
    },
    planned=("shm", "deepep_high_throughput", "deepep_low_latency", "pplx", "flashinfer_all2allv"),
)
EXECUTORS = Registry(
    "executor",
    "--distributed-executor-backend",
    {
        "uni": "moe_serve.executor.uni:UniExecutor",
        "mp": "moe_serve.executor.mp:MultiprocessExecutor",
    },
    planned=("ray", "external_launcher"),
)
EPLB_POLICIES = Registry(
    "EPLB policy",
    "--eplb-config.policy",
    {
        "sticky": "moe_serve.eplb.policies.sticky:sticky",
        "deepseek": "moe_serve.eplb.policies.deepseek:deepseek",
        "static": "moe_serve.eplb.policies.static:static",
        "shuffle": "moe_serve.eplb.policies.shuffle:shuffle",
    },
)
PlacementStrategy = Literal["linear", "round_robin"]
Size = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Section(BaseModel):
    """A frozen group of options; unknown names are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


def short(*names: str) -> dict[str, Any]:
    """Short spellings of a flag, kept beside the field."""
    return {"short": list(names)}


class ModelSection(Section):
    model: str | None = None
    """Model folder in the Hugging Face layout, or a name on the Hugging Face hub. Without one, the default model."""
    revision: str | None = None
    """Branch, tag or commit of a model that comes from the hub."""
    served_model_name: str | None = Field(None, min_length=1)
    """Name in the API; the model's own path or name if not given."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; auto takes what the checkpoint says."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA where there is one."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto reads the checkpoint; dummy makes random weights of its shapes (for measuring)."""
    max_model_len: Size | None = None
    """Longest prompt plus answer in tokens; what the checkpoint allows if not given."""


class EPLBConfig(Section):
    """Load balancing of experts."""

    window_size: Size = 1000
    """Steps over which expert load is summed."""
    step_interval: Size = 3000
    """Steps between two rearrangements."""
    num_redundant_experts: int = Field(0, ge=0)
    """Physical expert slots beyond one per logical expert, in each layer."""
    log_balancedness: bool = False
    """Log mean / max rank load."""
    policy: str = "sticky"
    """Which placement to aim for."""
    min_gain: float = Field(0.01, ge=0)
    """Least predicted gain of a rearrangement, as a share of the expert time saved over the next interval after
    paying for the move; 0 applies whatever the policy says."""
    max_bytes_per_step: Size = 1 << 20
    """Most bytes of expert weights that a rank sends or receives between two steps."""
    prefer_local: bool = True
    """Take the copy of an expert on the same rank, then the same node, first."""


class ParallelConfig(Section):
    pipeline_parallel_size: Size = Field(1, json_schema_extra=short("pp"))
    """Stages the layers are cut into."""
    tensor_parallel_size: Size = Field(1, json_schema_extra=short("tp"))
    """Ranks that share one data-parallel rank's attention."""
    data_parallel_size: Size = Field(1, json_schema_extra=short("dp"))
    """Engines, each with its own scheduler and KV cache."""
    data_parallel_size_local: int | None = Field(None, ge=0, json_schema_extra=short("dpl"))
    """Data-parallel ranks started on this node; all of them if not given."""
    data_parallel_rank: int | None = Field(None, ge=0, json_schema_extra=short("dpn"))
    """This server's data-parallel rank, where each rank has a server of its own."""
    data_parallel_rank_local: int | None = Field(None, ge=0)
    """This rank's place among the ranks of its node (chooses the device)."""
    data_parallel_master_ip: str = Field("127.0.0.1", json_schema_extra=short("dpa"))
    """Address of data-parallel rank 0, where everybody meets."""
    data_parallel_rpc_port: Port = Field(29550, json_schema_extra=short("dpp"))
    """Port of the coordinator on rank 0; the default counts only when an address or a rank is given (else any free
    port)."""
    data_parallel_master_port: Port = 29500
    """Port of the store on rank 0; the default counts only when an address or a rank is given (else any free port)."""
    data_parallel_backend: Literal["mp", "ray"] = Field("mp", json_schema_extra=short("dpb"))
    """How data-parallel ranks are started."""
    data_parallel_external_lb: bool = Field(False, json_schema_extra=short("dpe"))
    """One server per rank behind somebody else's load balancer."""
    data_parallel_hybrid_lb: bool = Field(False, json_schema_extra=short("dph"))
    """One server per node behind somebody else's load balancer."""
    enable_expert_parallel: bool = Field(False, json_schema_extra=short("ep"))
    """Spread whole experts over all dp x tp ranks; without it every expert is cut over the same ranks."""
    expert_placement_strategy: PlacementStrategy = "linear"
    """Which rank first holds which experts."""
    expert_placement_file: str | None = None
    """JSON file with the first placement (what `moe-serve eplb plan` writes), readable on every node; it goes before
    expert_placement_strategy, and its redundant slots must be eplb_config.num_redundant_experts."""
    all2all_backend: str = Field("allgather_reducescatter", json_schema_extra={"names": list(ALL2ALL)})
    """How tokens travel to their experts and back."""
    enable_eplb: bool = False
    """Watch expert load and move redundant experts."""
    eplb_config: EPLBConfig = EPLBConfig()
    """The load balancer's own options, as JSON or dotted."""
    max_parallel_loading_workers: Size | None = None
    """Ranks of one engine that read weights at the same time."""
    enable_dbo: bool = False
    """Overlap two half batches, one computing while the other travels."""
    dbo_decode_token_threshold: Size = 32
    """Fewest tokens of a decode-only step that is cut in two."""
    dbo_prefill_token_threshold: Size = 512
    """Fewest tokens of a step with prefill that is cut in two."""
    distributed_executor_backend: str | None = None
    """uni, mp, ray, external_launcher or package.module:Class; uni for one rank per engine, else mp."""
    decode_context_parallel_size: Size = 1
    """Ranks that share one sequence's KV cache while decoding; divides tensor_parallel_size."""

    @property
    def topology(self) -> Topology:
        return Topology(dp=self.data_parallel_size, pp=self.pipeline_parallel_size, tp=self.tensor_parallel_size)

    @property
    def world_size(self) -> int:
        """Ranks of one engine: pipeline x tensor."""
        return self.pipeline_parallel_size * self.tensor_parallel_size

    @property
    def world_size_across_dp(self) -> int:
        """Ranks of all engines."""
        return self.world_size * self.data_parallel_size

    @property
    def meets_at_given_address(self) -> bool:
        """Whether the default ports count: an address or a rank was given."""
        return bool({"data_parallel_master_ip", "data_parallel_rank"} & self.model_fields_set)

    @property
    def coordinator_port(self) -> int:
        """Where the coordinator listens; 0, any free port, where neither it nor an address or a rank was given."""
        counts = self.meets_at_given_address or "data_parallel_rpc_port" in self.model_fields_set
        return self.data_parallel_rpc_port if counts else 0

    @property
    def store_port(self) -> int:
        """Where rank 0's store listens; 0 as for `coordinator_port`."""
        counts = self.meets_at_given_address or "data_parallel_master_port" in self.model_fields_set
        return self.data_parallel_master_port if counts else 0

    @field_validator("distributed_executor_backend")
    @classmethod
    def _class_path(cls, value: str | None) -> str | None:
        """`package.module.Class` is as good as `package.module:Class`."""
        return ":".join(value.rsplit(".", 1)) if value and "." in value and ":" not in value else value

    @field_validator("data_parallel_master_ip")
    @classmethod
    def _address(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("data_parallel_master_ip must not be empty")
        return value

    @model_validator(mode="after")
    def _rules(self) -> Self:
        dp, local, rank = self.data_parallel_size, self.data_parallel_size_local, self.data_parallel_rank
        if local is not None and local > dp:
            raise ValueError(f"data_parallel_size_local ({local}) must be at most data_parallel_size ({dp})")
        if rank is not None and rank >= dp:
            raise ValueError(f"data_parallel_rank ({rank}) must lie in [0, {dp}), below data_parallel_size")
        if self.data_parallel_rank_local is not None and self.data_parallel_rank_local >= (local or dp):
            raise ValueError(
                f"data_parallel_rank_local ({self.data_parallel_rank_local}) must lie in [0, {local or dp})"
            )
        if (self.data_parallel_external_lb or self.data_parallel_hybrid_lb) and dp == 1:
            raise ValueError("data_parallel_external_lb and data_parallel_hybrid_lb need data_parallel_size > 1")
        if self.expert_placement_strategy != "linear" and not self.enable_expert_parallel:
            raise ValueError(
                f"expert_placement_strategy {self.expert_placement_strategy} needs enable_expert_parallel: without it "
                "every rank holds a part of every expert"
            )
        if self.tensor_parallel_size % self.decode_context_parallel_size:
            raise ValueError(
                f"decode_context_parallel_size ({self.decode_context_parallel_size}) must divide "
                f"tensor_parallel_size ({self.tensor_parallel_size})"
            )
        if self.enable_eplb:
            if not self.enable_expert_parallel:
                raise ValueError("enable_eplb needs enable_expert_parallel")
            if self.topology.ep == 1:
                raise ValueError("enable_eplb needs data_parallel_size x tensor_parallel_size > 1")
        elif self.eplb_config.num_redundant_experts:
            raise ValueError(
                f"eplb_config.num_redundant_experts ({self.eplb_config.num_redundant_experts}) needs enable_eplb"
            )
        if self.expert_placement_file is not None and not self.enable_expert_parallel:
            raise ValueError("expert_placement_file needs enable_expert_parallel")
        return self

    def check_built(self) -> None:
        """Raise ConfigError for an option that is known but whose feature is not built yet."""
        ALL2ALL.check(self.all2all_backend)
        if self.distributed_executor_backend is not None and ":" not in self.distributed_executor_backend:
            EXECUTORS.check(self.distributed_executor_backend)
        if self.distributed_executor_backend == "uni" and self.world_size > 1:
            raise ConfigError(
                f"distributed_executor_backend uni holds one rank, but pipeline x tensor is {self.world_size}; use mp"
            )
        waiting = {
            "pipeline_parallel_size": self.pipeline_parallel_size > 1,
            "decode_context_parallel_size": self.decode_context_parallel_size > 1,
            "enable_dbo": self.enable_dbo,
            "data_parallel_backend": self.data_parallel_backend != "mp",
            "data_parallel_external_lb": self.data_parallel_external_lb,
            "data_parallel_hybrid_lb": self.data_parallel_hybrid_lb,
            "data_parallel_rank": self.data_parallel_rank is not None,
            "data_parallel_rank_local": self.data_parallel_rank_local is not None,
            "data_parallel_size_local": self.data_parallel_size_local not in (None, self.data_parallel_size),
            "max_parallel_loading_workers": self.max_parallel_loading_workers is not None,
        }
        for name, asked in waiting.items():
            if asked:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is known but not built yet; leave {flag} at its default"
                )
        EPLB_POLICIES.check(self.eplb_config.policy)
        if self.eplb_config != EPLBConfig() and not self.enable_eplb:
            raise ConfigError("eplb_config has no effect without load balancing; add --enable-eplb")
        if {"dbo_decode_token_threshold", "dbo_prefill_token_threshold"} & self.model_fields_set:
            raise ConfigError("dbo thresholds are known but --enable-dbo is not built yet; leave them out")


class CacheSection(Section):
    block_size: Size = 16
    """Tokens in one KV block."""
    kv_cache_memory_bytes: Size | None = None
    """KV cache of each rank in bytes; worked out from gpu_memory_utilization if not given."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of the device's memory to use; on a CPU, of the memory now available, divided by the ranks on this
    machine and capped."""
    enable_prefix_caching: bool = True
    """Share KV blocks between requests with the same beginning."""


class SchedulerSection(Section):
    max_num_seqs: Size = 128
    """Most requests in one step of an engine; unless given, not more than max_num_batched_tokens."""
    max_num_batched_tokens: Size = 2048
    """Most tokens in one step of an engine; longer prompts are cut into chunks."""
    step_timeout_seconds: float = Field(60, gt=0, allow_inf_nan=False)
    """A step that takes longer ends the server with a message that says which rank it waited for."""

    @model_validator(mode="before")
    @classmethod
    def _fit_max_num_seqs(cls, values: object) -> object:
        """A small --max-num-batched-tokens alone must not clash with the default of --max-num-seqs."""
        if not isinstance(values, dict) or "max_num_seqs" in values:
            return values
        limit = str(values.get("max_num_batched_tokens", ""))
        default: int = cls.model_fields["max_num_seqs"].default
        return values | {"max_num_seqs": min(default, int(limit))} if limit.isdecimal() and int(limit) else values


class ServerSection(Section):
    host: str = "127.0.0.1"
    """Address the HTTP server listens on."""
    port: Port = 8000
    """Port the HTTP server listens on."""
    api_key: SecretStr | None = Field(None, min_length=1)
    """Key that clients must send as a bearer token."""
    shutdown_timeout: float = Field(30, ge=0, allow_inf_nan=False)
    """Seconds in-flight answers get to finish after SIGTERM."""
    max_body_bytes: Size = 16 * 2**20
    """Largest request body."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much to log."""


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "parallel": ParallelConfig,
    "cache": CacheSection,
    "scheduler": SchedulerSection,
    "server": ServerSection,
}


class Config(Section):
    """All sections. What every rank must agree on is `agreement()`."""

    model: ModelSection = ModelSection()
    parallel: ParallelConfig = ParallelConfig()
    cache: CacheSection = CacheSection()
    scheduler: SchedulerSection = SchedulerSection()
    server: ServerSection = ServerSection()

    @model_validator(mode="after")
    def _rules(self) -> Self:
        limit = self.scheduler.max_num_batched_tokens
        if limit < self.scheduler.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({limit}) must be at least max_num_seqs ({self.scheduler.max_num_seqs}), "
                "or running requests could not all take a step"
            )
        return self

    @classmethod
    def from_flat(cls, options: Mapping[str, object]) -> Config:
        """Config from options under their flag's names (with underscores); raises ConfigError."""
        owner = {field: section for section, kind in SECTIONS.items() for field in kind.model_fields}
        unknown = sorted(set(options) - set(owner))
        if unknown:
            raise ConfigError(f"unknown option {', '.join(unknown)}; known are: {', '.join(sorted(owner))}")
        nested: dict[str, dict[str, object]] = {}
        for field, value in options.items():
            nested.setdefault(owner[field], {})[field] = value
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            raise ConfigError(explain(error)) from error

    def agreement(self) -> dict[str, str]:
        """Option -> value as text, for all options that must be equal on every rank."""
        shared = {
            "model": ("model", "revision", "dtype", "load_format", "max_model_len"),
            "parallel": (
                "pipeline_parallel_size",
                "tensor_parallel_size",
                "data_parallel_size",
                "enable_expert_parallel",
                "expert_placement_strategy",
                "all2all_backend",
                "enable_eplb",
                "eplb_config",
                "expert_placement_file",
                "enable_dbo",
                "dbo_decode_token_threshold",
                "dbo_prefill_token_threshold",
                "decode_context_parallel_size",
            ),
            "cache": ("block_size", "enable_prefix_caching"),
            "scheduler": ("max_num_seqs", "max_num_batched_tokens", "step_timeout_seconds"),
        }
        values = self.model_dump(mode="json")
        return {
            field: json.dumps(values[section][field], sort_keys=True)
            for section, fields in shared.items()
            for field in fields
        }

    def compute_hash(self) -> str:
        """A stable hexadecimal digest of `agreement()`."""
        return hashlib.sha256(json.dumps(self.agreement(), sort_keys=True).encode()).hexdigest()

    def with_(self, section: str, **changes: object) -> Config:
        """A copy with some options of one section changed, validated again."""
        part: Section = getattr(self, section)
        values = {name: getattr(part, name) for name in part.model_fields_set} | changes
        return self.model_copy(update={section: type(part)(**values)})

    def to_json(self) -> str:
        """JSON for another process of this world, secrets included; only options that were set."""
        values = self.model_dump(mode="json", exclude_unset=True)
        if self.server.api_key is not None:
            values["server"]["api_key"] = self.server.api_key.get_secret_value()
        return json.dumps(values)


def differing_fields(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Sentences such as `block_size: 16 here, 32 there` for options two ranks do not agree on."""
    return [
        f"{name}: {mine.get(name, 'unknown')} here, {theirs.get(name, 'unknown')} there"
        for name in sorted(set(mine) | set(theirs))
        if mine.get(name) != theirs.get(name)
    ]


def explain(error: ValidationError) -> str:
    """A pydantic error as one readable line per problem, under the flag's name."""
    lines = []
    for problem in error.errors(include_url=False):
        path = [str(part) for part in problem["loc"] if part not in SECTIONS or len(problem["loc"]) == 1]
        message = problem["msg"].removeprefix("Value error, ")
        given = f" (given: {problem['input']!r})" if problem["type"] != "value_error" and path else ""
        lines.append((f"{'.'.join(path)}: " if path else "") + message + given)
    return "; ".join(lines)
