"""The section of ranks: how many, where they meet, how experts lie on them, and how their load is balanced."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from moe_serve.base.eplb_config import EPLBConfig
from moe_serve.base.errors import ConfigError
from moe_serve.base.nodes import NodesSection
from moe_serve.base.section import Host, Port, Size, short
from moe_serve.base.tables import ALL2ALL, EPLB_POLICIES, EXECUTORS
from moe_serve.base.topology import Topology

PlacementStrategy = Literal["linear", "round_robin"]
All2AllName = Annotated[str, AfterValidator(ALL2ALL.first_name)]


class ParallelConfig(NodesSection):
    pipeline_parallel_size: Size = Field(1, json_schema_extra=short("pp"))
    """Stages the layers are cut into."""
    tensor_parallel_size: Size = Field(1, json_schema_extra=short("tp"))
    """Ranks that share one data-parallel rank's attention."""
    data_parallel_size: Size = Field(1, json_schema_extra=short("dp"))
    """Engines, each with its own scheduler and KV cache."""
    data_parallel_size_local: int | None = Field(None, ge=0, json_schema_extra=short("dpl"))
    """Data-parallel ranks started on this node; all of them, or the one of data_parallel_rank, if not given."""
    data_parallel_start_rank: int | None = Field(None, ge=0, json_schema_extra=short("dpr"))
    """First data-parallel rank of this node, where others are started elsewhere."""
    data_parallel_rank: int | None = Field(None, ge=0, json_schema_extra=short("dpn"))
    """The one data-parallel rank started here, with a server of its own behind somebody else's load balancer."""
    data_parallel_rank_local: int | None = Field(None, ge=0)
    """This rank's place among the ranks of its node (chooses the device)."""
    data_parallel_address: Host = Field("127.0.0.1", json_schema_extra=short("dpa", "data-parallel-master-ip"))
    """Address or name of data-parallel rank 0, where everybody meets; one that does not resolve yet is waited for."""
    data_parallel_rpc_port: Port = Field(29550, json_schema_extra=short("dpp"))
    """Port of the coordinator on rank 0; the default counts only when an address or a rank is given (else any free
    port)."""
    data_parallel_master_port: Port = 0
    """Port of the store on rank 0; 0 for any free one, which the others are told."""
    data_parallel_backend: Literal["mp", "ray"] = Field("mp", json_schema_extra=short("dpb"))
    """How data-parallel ranks are started: mp on the node of each command, ray as actors on the nodes of a Ray cluster,
    all by one command; data_parallel_size_local is then the driver's share, and the most of any other node."""
    disable_nccl_for_dp_synchronization: bool = True
    """Data-parallel ranks agree on their steps over gloo, on the CPU: always so here, as their engines hold no device.
    Known for the start lines of other servers; off is refused."""
    data_parallel_external_lb: bool = Field(False, json_schema_extra=short("dpe"))
    """One server per rank behind somebody else's load balancer; data_parallel_rank says it already."""
    data_parallel_hybrid_lb: bool = Field(False, json_schema_extra=short("dph"))
    """One server per node, for the ranks of that node, behind somebody else's load balancer."""
    data_parallel_multi_port_external_lb: bool = Field(False, json_schema_extra=short("dpm"))
    """One server per rank of this node, each at a port of its own from --port on, behind somebody else's load balancer;
    a supervisor starts them and speaks for all of them."""
    data_parallel_supervisor_port: Port = 9256
    """Port of that supervisor's own HTTP server: /readyz, /livez and /ranks of this node."""
    world_token_file: str | None = None
    """File with the secret that all processes of the world know (MOE_SERVE_WORLD_TOKEN goes before it)."""
    start_timeout_seconds: float = Field(1800, gt=0, allow_inf_nan=False)
    """For all ranks to meet and load."""
    restart_world: bool = False
    """When the world has ended because a rank died, start this node's part of the next one, in the same launcher."""
    enable_expert_parallel: bool = Field(False, json_schema_extra=short("ep"))
    """Spread whole experts over all dp x tp ranks; without it every expert is cut over the same ranks."""
    expert_placement_strategy: PlacementStrategy = "linear"
    """Which rank first holds which experts."""
    expert_placement_file: str | None = None
    """JSON file with the first placement (what `moe-serve eplb plan` writes), readable on every node; it goes before
    expert_placement_strategy, and its redundant slots must be eplb_config.num_redundant_experts."""
    all2all_backend: All2AllName = Field("auto", json_schema_extra={"names": ["auto", *ALL2ALL]})
    """How tokens travel to their experts and back; auto: shm where all ranks are on the CPUs of one machine, else
    allgather_reducescatter."""
    all2all_dtype: Literal["auto", "fp8"] = "auto"
    """Type of rows on their way to experts; fp8: a scale for each 128 columns, where the backend can."""
    enable_eplb: bool = False
    """Watch expert load and move redundant experts."""
    eplb_config: EPLBConfig = EPLBConfig()
    """The load balancer's own options, as JSON or dotted."""
    max_parallel_loading_workers: Size | None = None
    """Most ranks of one engine that read weights at the same time, where memory or disks bear no more; all if not
    given. The others wait for their turn."""
    enable_dbo: bool = False
    """Overlap two half batches, one computing while the other travels."""
    dbo_decode_token_threshold: Size = 32
    """Fewest tokens of a decode-only step that is cut in two."""
    dbo_prefill_token_threshold: Size = 512
    """Fewest tokens of a step with prefill that is cut in two."""
    distributed_executor_backend: str | None = None
    """uni, mp, ray, external_launcher or package.module:Class. uni for one rank per engine; of several ray inside a Ray
    placement group and where this machine has too few GPUs for an engine, else mp."""
    worker_cls: str | None = None
    """package.module:Class of workers, a subclass of moe_serve.worker.worker:Worker; that one if not given."""
    worker_extension_cls: str | None = None
    """package.module:Class that the class of workers is mixed with; no name of the one may be a name of the other."""
    ray_address: str | None = None
    """HOST:PORT of the Ray cluster; the surrounding one, RAY_ADDRESS, or the one of this machine, if not given."""
    ray_placement_group: str | None = None
    """Id of the Ray placement group whose bundles the workers take; the surrounding one, or one of their own."""
    ray_bundle_indices: str | None = None
    """Its bundles for the ranks, such as 0,1,4,5; the first that hold the device, if not given."""
    ray_runtime_env: dict[str, Any] | None = None
    """Runtime environment of Ray's actors, as JSON, such as {"env_vars": {"A": "1"}}; no place for secrets, as it is in
    Ray's records and at /config."""
    ray_workers_use_nsight: bool = False
    """Run actors that compute under Nsight Systems (nsys must be on every node); reports are in Ray's log folder."""
    decode_context_parallel_size: Size = Field(1, json_schema_extra=short("dcp"))
    """Ranks that share a sequence's KV cache: of those that would hold the same KV head, as many as divide them."""

    @property
    def topology(self) -> Topology:
        sizes = (self.data_parallel_size, self.pipeline_parallel_size, self.tensor_parallel_size)
        return Topology(*sizes, nodes=self.nnodes, dcp=self.decode_context_parallel_size)

    @property
    def world_size(self) -> int:
        """Ranks of one engine: pipeline x tensor."""
        return self.pipeline_parallel_size * self.tensor_parallel_size

    @property
    def world_size_across_dp(self) -> int:
        """Ranks of all engines."""
        return self.world_size * self.data_parallel_size

    @property
    def load_balancing(self) -> Literal["internal", "external", "hybrid"]:
        """Who spreads requests over engines: the one API server, somebody outside, or both."""
        if self.data_parallel_external_lb or self.data_parallel_rank is not None:
            return "external"
        if self.data_parallel_multi_port_external_lb:
            return "external"
        return "hybrid" if self.data_parallel_hybrid_lb else "internal"

    @property
    def start_rank(self) -> int | None:
        """First data-parallel rank of this node, if it was said."""
        if self.node_rank is not None and self.data_parallel_size_local is not None:
            return self.node_rank * self.data_parallel_size_local
        return self.data_parallel_start_rank

    @property
    def dp_ranks_here(self) -> tuple[int, ...]:
        """Data-parallel ranks whose engines are started here: on this node, but for those that Ray starts."""
        if self.is_beside:
            return ()
        if self.data_parallel_backend == "ray":
            return tuple(range(self.data_parallel_size))
        if self.data_parallel_rank is not None:
            return (self.data_parallel_rank,)
        start = self.start_rank or 0
        size = (
            self.data_parallel_size - start if self.data_parallel_size_local is None else self.data_parallel_size_local
        )
        return tuple(range(start, start + size))

    @property
    def is_apart(self) -> bool:
        """Whether other ranks of the world are started elsewhere."""
        return self.is_spread or len(self.dp_ranks_here) < self.data_parallel_size

    @property
    def num_frontends(self) -> int:
        """Launchers whose API servers the world waits for."""
        if self.load_balancing == "external":
            return self.data_parallel_size
        return 1 if self.load_balancing == "internal" else self.data_parallel_size // len(self.dp_ranks_here)

    @property
    def coordinator_host(self) -> str:
        """Where everybody meets."""
        return self.master_addr or self.data_parallel_address

    @property
    def coordinator_port(self) -> int:
        """Where the coordinator listens; 0, any free port, where nobody else must know it beforehand."""
        if self.is_spread:
            return self.master_port
        told = {"data_parallel_address", "data_parallel_rpc_port"} & self.model_fields_set
        known = told or self.is_apart or self.data_parallel_multi_port_external_lb
        return self.data_parallel_rpc_port if known else 0

    @field_validator("ray_placement_group", mode="before")
    @classmethod
    def _group_id(cls, value: object) -> object:
        """A Ray PlacementGroup is as good as its id."""
        return value.id.hex() if hasattr(value, "id") and hasattr(value, "bundle_specs") else value

    @field_validator("distributed_executor_backend", "worker_cls", "worker_extension_cls")
    @classmethod
    def _class_path(cls, value: str | None) -> str | None:
        """`package.module.Class` is as good as `package.module:Class`."""
        return ":".join(value.rsplit(".", 1)) if value and "." in value and ":" not in value else value

    @field_validator("data_parallel_address")
    @classmethod
    def _address(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("data_parallel_address must not be empty")
        return value

    @model_validator(mode="after")
    def _rules(self) -> Self:
        dp, local, rank = self.data_parallel_size, self.data_parallel_size_local, self.data_parallel_rank
        if local is not None and local > dp:
            raise ValueError(f"data_parallel_size_local ({local}) must be at most data_parallel_size ({dp})")
        if rank is not None and rank >= dp:
            raise ValueError(f"data_parallel_rank ({rank}) must lie in [0, {dp}), below data_parallel_size")
        self._check_parts()
        if self.data_parallel_rank_local is not None and self.data_parallel_rank_local >= (local or dp):
            raise ValueError(
                f"data_parallel_rank_local ({self.data_parallel_rank_local}) must lie in [0, {local or dp})"
            )
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
        if self.enable_dbo and self.topology.ep == 1:
            raise ValueError("enable_dbo needs data_parallel_size x tensor_parallel_size > 1: else no rows travel")
        if self.expert_placement_file is not None and not self.enable_expert_parallel:
            raise ValueError("expert_placement_file needs enable_expert_parallel")
        return self

    def _check_parts(self) -> None:
        """Which ranks this node starts, beside those of others."""
        dp, local, rank = self.data_parallel_size, self.data_parallel_size_local, self.data_parallel_rank
        start, hybrid = self.start_rank, self.data_parallel_hybrid_lb
        self.check_nodes(dp, self.world_size, self.distributed_executor_backend)
        if self.is_spread:
            return
        self._check_node()
        if (self.data_parallel_external_lb or hybrid) and dp == 1:
            raise ValueError("data_parallel_external_lb and data_parallel_hybrid_lb need data_parallel_size > 1")
        if self.data_parallel_external_lb and rank is None:
            raise ValueError("data_parallel_external_lb needs data_parallel_rank: which rank is this?")
        if rank is not None and (hybrid or self.headless or start is not None or local not in (None, 1)):
            raise ValueError(
                "data_parallel_rank is for one rank with a server of its own; it goes with none of "
                "data_parallel_hybrid_lb, headless, data_parallel_start_rank and data_parallel_size_local"
            )
        if start is not None and start + (local or 1) > dp:
            raise ValueError(
                f"data_parallel_start_rank ({start}) and data_parallel_size_local ({local or 1}) reach beyond "
                f"data_parallel_size ({dp})"
            )
        if hybrid and (local is None or dp % local):
            raise ValueError(
                f"data_parallel_hybrid_lb needs data_parallel_size_local, a divisor of data_parallel_size ({dp}): as "
                f"many ranks on each node (given: {local})"
            )
        if hybrid and local and (start or 0) % local:
            raise ValueError(
                f"data_parallel_start_rank ({start}) must be a multiple of data_parallel_size_local ({local}) with "
                "data_parallel_hybrid_lb: as many ranks on each node"
            )
        if local == 0:
            raise ValueError("data_parallel_size_local 0 is a node without ranks, which has nothing to do")
        if self.headless and (hybrid or not start):
            raise ValueError(
                "headless is for a node beside that of rank 0: give data_parallel_start_rank (above 0) and "
                "data_parallel_size_local, and no data_parallel_hybrid_lb"
            )
        if start and not hybrid and not self.headless and not self.data_parallel_multi_port_external_lb:
            raise ValueError(
                "data_parallel_start_rank above 0 needs headless (the server is on rank 0's node), "
                "data_parallel_hybrid_lb (a server on each node) or data_parallel_multi_port_external_lb (one for each "
                "rank)"
            )

    def _check_node(self) -> None:
        """Which node this is, and whether a supervisor can start its ranks."""
        rank, local = self.data_parallel_rank, self.data_parallel_size_local
        if self.node_rank is not None and (not local or self.data_parallel_start_rank is not None):
            raise ValueError(
                f"node_rank ({self.node_rank}) needs data_parallel_size_local, the ranks of each node (or nnodes, for "
                "one engine on several), and says data_parallel_start_rank by itself: give the one and leave out the "
                "other"
            )
        if not self.data_parallel_multi_port_external_lb:
            if "data_parallel_supervisor_port" in self.model_fields_set:
                raise ValueError("data_parallel_supervisor_port needs data_parallel_multi_port_external_lb")
            return
        others = {
            "data_parallel_rank": rank is not None,
            "data_parallel_rank_local": self.data_parallel_rank_local is not None,
            "data_parallel_external_lb": self.data_parallel_external_lb,
            "data_parallel_hybrid_lb": self.data_parallel_hybrid_lb,
            "headless": self.headless,
        }
        if given := [name for name, is_given in others.items() if is_given]:
            raise ValueError(
                f"data_parallel_multi_port_external_lb starts ranks with a server each, and does not go with "
                f"{' and '.join(given)}; leave that out (the first rank of this node is data_parallel_start_rank)"
            )
        if self.data_parallel_size == 1:
            raise ValueError("data_parallel_multi_port_external_lb needs data_parallel_size > 1")

    def check_built(self) -> None:
        """Raise ConfigError for an option that is known but whose feature is not built yet."""
        if self.all2all_backend != "auto":
            ALL2ALL.check(self.all2all_backend)
        if self.distributed_executor_backend is not None and ":" not in self.distributed_executor_backend:
            EXECUTORS.check(self.distributed_executor_backend)
        if self.distributed_executor_backend == "uni" and self.world_size > 1:
            raise ConfigError(
                f"distributed_executor_backend uni holds one rank, but pipeline x tensor is {self.world_size}; use mp"
            )
        if not self.disable_nccl_for_dp_synchronization:
            raise ConfigError(
                "disable_nccl_for_dp_synchronization=False is not built: data-parallel ranks agree over gloo, on the "
                "CPU, as their votes are a few integers of processes that hold no device; leave out "
                "--no-disable-nccl-for-dp-synchronization"
            )
        EPLB_POLICIES.check(self.eplb_config.policy)
        if self.eplb_config != EPLBConfig() and not self.enable_eplb:
            raise ConfigError("eplb_config has no effect without load balancing; add --enable-eplb")
