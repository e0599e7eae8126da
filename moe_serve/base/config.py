"""What the operator says: frozen sections with defaults and rules. Flags, environment, YAML and docs come from here.

A rule that stands alone is a validator; what depends on the checkpoint or the device is settled once by
`resolve()` (in `launch/resolve.py` for the node, in the worker for the device), after which nothing is "auto".
Knows no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Literal, Self, get_args

from pydantic import Field, SecretStr, ValidationError, model_validator

from moe_serve.base.errors import ConfigError
from moe_serve.base.fingerprint import model_fingerprint
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.base.section import MAX_PORT, Host, Port, Section, Size, short
from moe_serve.base.version import package_version


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
    kernels: Literal["auto", "torch", "generic", "avx2", "avx512", "avx512_bf16", "amx"] = "auto"
    """What computes in bfloat16 on a CPU: operations compiled for its instructions, or torch's own. auto takes the
    best that was measured to be faster than torch: amx, avx512 or avx2."""
    enforce_eager: bool = False
    """Run every decode step operation by operation: for looking into a step, or comparing. Without it, steps of the
    compiled kernels are recorded once for each number of rows, up to 64, and replayed."""
    profile: str | None = None
    """Write what each rank computes and what is on its way, by layer and half, as a Chrome trace: this file with the
    rank in its name."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto reads the checkpoint; dummy makes random weights of its shapes (for measuring)."""
    max_model_len: Size | None = None
    """Longest prompt plus answer in tokens; what the checkpoint allows if not given."""


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
    max_num_queued_reqs: int | None = Field(None, ge=0)
    """Requests that may wait before a new one is refused with 503, for all API servers of one launcher; two rounds of
    max_num_seqs of their engines if not given, fewer while they would wait longer than 30 s."""
    max_num_queued_tokens: int | None = Field(None, ge=0)
    """Prompt tokens that may wait before a new request is refused with 503, for all API servers of one launcher; twice
    the KV cache of their engines if not given, fewer while they would wait longer than 30 s."""
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
    host: Host = "127.0.0.1"
    """Address the HTTP server listens on; an IPv6 one with or without brackets, here and elsewhere."""
    port: Port = 8000
    """Port the HTTP server listens on."""
    api_server_count: int = Field(1, ge=1, le=64, json_schema_extra=short("asc"))
    """API server processes of this launcher. They share its port, its limits of requests and tokens that may wait, and
    what they know of the engines; each of them shows the metrics of all."""
    api_key: SecretStr | None = Field(None, min_length=1)
    """Key that clients must send as a bearer token; given by its variable, it is in no command line."""
    admin_api_key: SecretStr | None = Field(None, min_length=1)
    """Key that orders need (POST /eplb/...); the API key if not given. Without either, orders are taken only from this
    machine."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages that may use this server from a browser, such as https://chat.example; * for all."""
    shutdown_timeout: float = Field(30, ge=0, allow_inf_nan=False)
    """Seconds in-flight answers get to finish after SIGTERM; what is left then is named and ended."""
    max_body_bytes: Size = 16 * 2**20
    """Largest request body; orders (POST /eplb/...) may have 8 MiB, everything that is not a POST 64 KiB."""
    max_unfinished_body_bytes: Size = 256 * 2**20
    """Bytes of bodies that have not arrived whole, of all connections of an API server, before more are refused with
    503."""
    max_connections: Size | None = None
    """HTTP connections held at once by an API server, before more are answered with 503; as many as the limit of open
    files allows if not given."""
    timeout_keep_alive: float = Field(90, ge=0, allow_inf_nan=False)
    """Seconds that an idle connection is kept; more than a load balancer in front keeps its own."""
    timeout_headers: float = Field(20, gt=0, allow_inf_nan=False)
    """Seconds for the head of a request to arrive, from its first byte or from the connection."""
    timeout_body: float = Field(60, gt=0, allow_inf_nan=False)
    """Seconds for the body of a request to arrive, and one more for each 16 KiB of it."""
    chat_template_timeout: float = Field(5, gt=0, le=3600, allow_inf_nan=False)
    """Seconds that the chat template may take over one conversation."""
    sanitize_control_tokens: bool = False
    """Read control tokens (special tokens, and others that the chat template writes) in the messages, tools and
    chat_template_kwargs of a request as ordinary text, so that only the template itself can write them."""
    strict_fields: bool = False
    """Refuse requests that have unknown fields (400); else such fields are ignored, and named in a warning once for
    each client and field."""
    access_log: bool = True
    """Log a line for each request. Lines about refused requests and about throughput come anyway."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much to log."""


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "parallel": ParallelConfig,
    "cache": CacheSection,
    "scheduler": SchedulerSection,
    "server": ServerSection,
}


SECOND_NAMES = {"data_parallel_master_ip": "data_parallel_address"}
"""Of options, as LLM takes them; the command line has them beside the fields."""
KEYS = {name for name, field in ServerSection.model_fields.items() if SecretStr in get_args(field.annotation)}
"""Options that are secrets of the API server and its clients."""


class Config(Section):
    """All sections. What every rank must agree on is `agreement()`."""

    model: ModelSection = ModelSection()
    parallel: ParallelConfig = ParallelConfig()
    cache: CacheSection = CacheSection()
    scheduler: SchedulerSection = SchedulerSection()
    server: ServerSection = ServerSection()

    @model_validator(mode="after")
    def _rules(self) -> Self:
        sharing = self.parallel.decode_context_parallel_size
        if self.cache.block_size % sharing:
            raise ValueError(
                f"block_size ({self.cache.block_size}) must be a multiple of decode_context_parallel_size ({sharing}): "
                "each rank keeps as much of a block"
            )
        limit = self.scheduler.max_num_batched_tokens
        if limit < self.scheduler.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({limit}) must be at least max_num_seqs ({self.scheduler.max_num_seqs}), "
                "or running requests could not all take a step"
            )
        if self.parallel.data_parallel_multi_port_external_lb:
            self._check_ports()
        if (self.parallel.headless or self.parallel.is_beside) and self.server.api_server_count > 1:
            why = "headless" if self.parallel.headless else f"node_rank ({self.parallel.node_rank})"
            raise ValueError(
                f"api_server_count ({self.server.api_server_count}) does not go with {why}, which is for a node "
                "without an API server; give it to the node of rank 0"
            )
        return self

    def _check_ports(self) -> None:
        """Ports that somebody else must know beforehand: one for each rank of this node, and their supervisor's."""
        first, num_ranks = self.server.port, len(self.parallel.dp_ranks_here)
        last, supervisor = first + num_ranks - 1, self.parallel.data_parallel_supervisor_port
        if not first or not supervisor:
            raise ValueError(
                f"port ({first}) and data_parallel_supervisor_port ({supervisor}) must be known beforehand, so that "
                "0 (any free one) cannot be either of them with data_parallel_multi_port_external_lb"
            )
        if last > MAX_PORT:
            raise ValueError(
                f"port ({first}) is the first of {num_ranks}, one for each rank of this node, which reach beyond "
                f"{MAX_PORT}; give one up to {MAX_PORT - num_ranks + 1}"
            )
        if first <= supervisor <= last:
            raise ValueError(
                f"data_parallel_supervisor_port ({supervisor}) lies among the ports of this node's ranks, {first} to "
                f"{last} (option --port); give another"
            )

    @classmethod
    def from_flat(cls, options: Mapping[str, object]) -> Config:
        """Config from options under their flag's names (with underscores); raises ConfigError."""
        owner = {field: section for section, kind in SECTIONS.items() for field in kind.model_fields}
        options = {SECOND_NAMES.get(name, name): value for name, value in options.items()}
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
        """Option -> value as text, for all options that must be equal on every rank.

        `model` by what the folder holds: every node may have its copy at a path of its own.
        """
        shared = {
            "model": ("model", "revision", "dtype", "kernels", "load_format", "max_model_len"),
            "parallel": (
                "pipeline_parallel_size",
                "tensor_parallel_size",
                "data_parallel_size",
                "nnodes",
                "enable_expert_parallel",
                "expert_placement_strategy",
                "all2all_backend",
                "all2all_dtype",
                "enable_eplb",
                "eplb_config",
                "expert_placement_file",
                "max_parallel_loading_workers",
                "worker_cls",
                "worker_extension_cls",
                "enable_dbo",
                "dbo_decode_token_threshold",
                "dbo_prefill_token_threshold",
                "decode_context_parallel_size",
            ),
            "cache": ("block_size", "enable_prefix_caching"),
            "scheduler": ("max_num_seqs", "max_num_batched_tokens", "step_timeout_seconds"),
        }
        values = self.model_dump(mode="json")
        values["model"]["model"] = model_fingerprint(self.model.model)
        agreed = {field: values[section][field] for section, fields in shared.items() for field in fields}
        agreed["load_balancing"] = self.parallel.load_balancing
        agreed["version"] = package_version()
        return {name: json.dumps(value, sort_keys=True) for name, value in agreed.items()}

    def compute_hash(self) -> str:
        """A stable hexadecimal digest of `agreement()`."""
        return hashlib.sha256(json.dumps(self.agreement(), sort_keys=True).encode()).hexdigest()

    def with_(self, section: str, **changes: object) -> Config:
        """A copy with some options of one section changed, validated again."""
        part: Section = getattr(self, section)
        values = {name: getattr(part, name) for name in part.model_fields_set} | changes
        return self.model_copy(update={section: type(part)(**values)})

    def to_json(self, *, keys: bool = False) -> str:
        """JSON for another process of this world; only options that were set.

        With the `keys` of clients for an API server alone: nobody else needs them.
        """
        values = self.model_dump(mode="json", exclude_unset=True)
        server = values.get("server", {})
        for name in KEYS & server.keys():
            secret: SecretStr | None = getattr(self.server, name)
            if keys and secret is not None:
                server[name] = secret.get_secret_value()
            else:
                del server[name]
        return json.dumps(values)


def differing_fields(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Such as `block_size: 32, not 16` for options that two ranks do not agree on, theirs first: who reads it may be
    either."""
    return [
        f"{name}: {theirs.get(name, 'unknown')}, not {mine.get(name, 'unknown')}"
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
