"""The world that a configuration asks for, before anything is started: who is where, holds what, listens at which port.

Pure numbers from the rules that the ranks themselves go by; neither torch nor weights are needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.launched import EXTERNAL_LAUNCHER
from moe_serve.base.model_config import ModelConfig
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.base.topology import Topology
from moe_serve.launch.ports import PortPlan, check_ports, ports_of_node
from moe_serve.launch.serve import describe
from moe_serve.model.footprint import Footprint, footprints
from moe_serve.model.partition import Partition, make_partitions
from moe_serve.worker.kv_room import Room, fitting_blocks

AS_ACTOR = ", a Ray actor"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """One rank. `layers` and `expert_width` are [first, one past the last]; bytes are bytes.

    `experts[m]`: logical experts in slot order of the m-th of these layers that has experts. `kv_blocks` None where the
    room is not known.
    """

    rank: int
    dp: int
    pp: int
    tp: int
    ep: int
    node: int
    local_rank: int
    device: str
    layers: tuple[int, int]
    experts: list[list[int]]
    expert_width: tuple[int, int]
    whole_experts: bool
    weight_bytes: int
    expert_weight_bytes: int
    kv_block_bytes: int
    kv_blocks: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPlan:
    """A process and the global ranks that compute in it."""

    name: str
    ranks: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePlan:
    """What one launcher starts; `here` if it is that with the very options that were given."""

    node: int
    here: bool
    dp_ranks: list[int]
    processes: list[ProcessPlan]
    ports: list[PortPlan]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldPlan:
    """`kv_tokens` of an engine, by the rank with the least room; None where the room is not known."""

    summary: str
    dtype: str
    max_model_len: int
    block_size: int
    kv_tokens: int | None
    ranks: list[RankPlan]
    nodes: list[NodePlan]


@dataclass(frozen=True, slots=True)
class _BlockShape:
    block_size: int
    block_bytes: int


def plan_world(resolved: Config, model: ModelConfig, *, memory_bytes: int | None = None) -> WorldPlan:
    """`memory_bytes` that each rank is taken to have. ConfigError, with what would do, for what cannot be."""
    nodes = dp_ranks_of_nodes(resolved.parallel)
    partitions = make_partitions(model, resolved.parallel)
    sizes = footprints(partitions, resolved.model.dtype)
    kept_tokens = resolved.cache.block_size // resolved.parallel.decode_context_parallel_size
    shapes = [_BlockShape(resolved.cache.block_size, each.token_kv * kept_tokens) for each in sizes]
    blocks = [
        _blocks(resolved, shape, size, rank, memory_bytes)
        for rank, (shape, size) in enumerate(zip(shapes, sizes, strict=True))
    ]
    known = [each for each in blocks if each is not None]
    plan = WorldPlan(
        summary=describe(resolved, model),
        dtype=resolved.model.dtype,
        max_model_len=resolved.model.max_model_len or model.max_position_embeddings,
        block_size=resolved.cache.block_size,
        kv_tokens=min(known) * resolved.cache.block_size if known else None,
        ranks=[
            _rank(resolved, model, nodes, rank, *each)
            for rank, each in enumerate(zip(partitions, sizes, shapes, blocks, strict=True))
        ],
        nodes=[_node(resolved, node, dp_ranks) for node, dp_ranks in enumerate(nodes)],
    )
    for each in plan.nodes:
        check_ports(each.ports)
    return plan


def _node(config: Config, node: int, dp_ranks: Sequence[int]) -> NodePlan:
    parallel = config.parallel
    beside = parallel.is_spread and node > 0
    return NodePlan(
        node=node,
        here=node == parallel.node_rank if parallel.is_spread else dp_ranks[0] == parallel.dp_ranks_here[0],
        dp_ranks=list(dp_ranks),
        processes=_beside(parallel.topology, node)
        if beside
        else processes_of_node(parallel, dp_ranks, config.server.api_server_count),
        ports=ports_of_node(config, dp_ranks),
    )


def dp_ranks_of_nodes(parallel: ParallelConfig) -> list[range]:
    """This node's, as its options say; the others, which have their own options, are taken to have as many each.

    Of the one engine that is spread over nodes, node 0 has it, the others have workers of it.
    """
    if parallel.is_spread:
        return [range(1), *[range(0)] * (parallel.nnodes - 1)]
    here, dp = parallel.dp_ranks_here, parallel.data_parallel_size
    if parallel.data_parallel_backend == "ray":  # which knows what room there is; this node is filled first
        size = parallel.data_parallel_size_local or dp
        return [range(start, min(start + size, dp)) for start in range(0, dp, size)]
    first, size = here[0], len(here)
    before = [range(start, min(start + size, first)) for start in range(0, first, size)]
    after = [range(start, min(start + size, dp)) for start in range(first + size, dp, size)]
    return [*before, range(first, first + size), *after]


def processes_of_node(parallel: ParallelConfig, dp_ranks: Sequence[int], api_servers: int = 1) -> list[ProcessPlan]:
    """In the order in which they are started."""
    if parallel.distributed_executor_backend == EXTERNAL_LAUNCHER:
        return [rank for dp in dp_ranks for rank in _ranks_launched_elsewhere(parallel.topology, dp)]
    if not parallel.data_parallel_multi_port_external_lb:
        return _launched(parallel, dp_ranks, api_servers)
    found = [ProcessPlan(name="supervisor", ranks=[])]
    for dp in dp_ranks:
        found += _launched(parallel, [dp], api_servers, of=f" of rank {dp}")
    return found


def _beside(topology: Topology, node: int) -> list[ProcessPlan]:
    """A launcher that has nothing but workers of the engine on node 0."""
    return [ProcessPlan(name="launcher", ranks=[]), *_workers(topology, 0, topology.workers_of_node(node))]


def _workers(topology: Topology, dp: int, workers: Iterable[int], how: str = "") -> list[ProcessPlan]:
    return [
        ProcessPlan(name=topology.describe_worker(dp, worker) + how, ranks=[topology.worker_rank(dp, worker)])
        for worker in workers
    ]


def _ranks_launched_elsewhere(topology: Topology, dp: int) -> list[ProcessPlan]:
    """Each is engine and worker at once."""
    ranks = enumerate(topology.worker_rank(dp, worker) for worker in range(topology.num_workers))
    return [
        ProcessPlan(name=f"LLM of rank {rank}, {topology.describe_worker(dp, worker)}", ranks=[rank])
        for worker, rank in ranks
    ]


def _launched(
    parallel: ParallelConfig, dp_ranks: Sequence[int], api_servers: int, *, of: str = ""
) -> list[ProcessPlan]:
    """A launcher and what it starts."""
    holds = 0 in dp_ranks
    if not holds and parallel.data_parallel_backend == "ray":
        return [process for dp in dp_ranks for process in _engine(parallel, dp)]
    found = [ProcessPlan(name=f"launcher{of}{', with the coordinator' if holds else ''}", ranks=[])]
    if holds and parallel.enable_eplb:
        found += [ProcessPlan(name=f"solver of {what}", ranks=[]) for what in ("decisions", "requests")]
    for dp in dp_ranks:
        found += _engine(parallel, dp)
    if holds or parallel.load_balancing != "internal":
        numbers = [""] if api_servers == 1 else [f" {place}" for place in range(api_servers)]
        found += [ProcessPlan(name=f"API server{number}{of}", ranks=[]) for number in numbers]
    return found


def _engine(parallel: ParallelConfig, dp: int) -> list[ProcessPlan]:
    topology, executor = parallel.topology, parallel.distributed_executor_backend
    name = f"engine dp {dp}" + (AS_ACTOR if parallel.data_parallel_backend == "ray" else "")
    if executor in ("mp", "ray"):
        how = AS_ACTOR if executor == "ray" else ""
        return [ProcessPlan(name=name, ranks=[]), *_workers(topology, dp, topology.workers_of_node(0), how)]
    ranks = [topology.worker_rank(dp, worker) for worker in range(topology.num_workers)]
    elsewhere = "" if executor == "uni" else f", workers as {executor} has it"
    return [ProcessPlan(name=f"{name}{elsewhere}", ranks=ranks)]


def _rank(
    config: Config,
    model: ModelConfig,
    nodes: Sequence[range],
    rank: int,
    part: Partition,
    size: Footprint,
    shape: _BlockShape,
    blocks: int | None,
) -> RankPlan:
    topology = config.parallel.topology
    dp, pp, tp = topology.coordinates(rank)
    node, local_rank = _place(config.parallel, nodes, rank)
    on_ray = "ray" in (config.parallel.distributed_executor_backend, config.parallel.data_parallel_backend)
    device = f"cuda:{0 if on_ray else local_rank}" if config.model.device == "cuda" else config.model.device
    return RankPlan(
        rank=rank,
        dp=dp,
        pp=pp,
        tp=tp,
        ep=topology.ep_rank(rank),
        node=node,
        local_rank=local_rank,
        device=device,
        layers=(part.layers.start, part.layers.stop),
        experts=[part.experts_of(number) for number in part.moe_numbers],
        expert_width=(part.width.start, part.width.stop),
        whole_experts=len(part.width) == model.expert_size,
        weight_bytes=size.weights,
        expert_weight_bytes=size.experts,
        kv_block_bytes=shape.block_bytes,
        kv_blocks=blocks,
    )


def _place(parallel: ParallelConfig, nodes: Sequence[range], rank: int) -> tuple[int, int]:
    """The node of a rank, and its place there."""
    topology, worker = parallel.topology, parallel.topology.worker_index(rank)
    if parallel.is_spread:
        node = topology.node_of(worker)
        return node, topology.workers_of_node(node).index(worker)
    dp, _, _ = topology.coordinates(rank)
    node = next(number for number, dp_ranks in enumerate(nodes) if dp in dp_ranks)
    place, told = nodes[node].index(dp), parallel.data_parallel_rank_local
    if told is not None and dp in parallel.dp_ranks_here:
        place = told
    return node, place * topology.num_workers + worker


def _blocks(config: Config, shape: _BlockShape, size: Footprint, rank: int, memory_bytes: int | None) -> int | None:
    """KV blocks of a rank; None where neither its memory nor the bytes of its cache were given."""
    asked, max_model_len = config.cache.kv_cache_memory_bytes, config.model.max_model_len or 1
    if memory_bytes is None:
        room = None if asked is None else Room(sys.maxsize, "not known")
    else:
        room = _room(config, size, rank, memory_bytes)
    return None if room is None else fitting_blocks(shape, config, max_model_len=max_model_len, room=room)


def _room(config: Config, size: Footprint, rank: int, memory_bytes: int) -> Room:
    """What the weights leave of a rank's memory; what a step's activations take is measured only when it is there."""
    share = 1.0 if config.cache.kv_cache_memory_bytes is not None else config.cache.gpu_memory_utilization
    usable = int(memory_bytes * share)
    if size.weights > usable:
        raise ConfigError(
            f"the weights of {config.parallel.topology.describe(rank)} take {size.weights:,} bytes, but it may have "
            f"{usable:,} (gpu_memory_utilization {share:g} of --memory-bytes {memory_bytes:,}); spread the model over "
            "more ranks (--tensor-parallel-size, or --data-parallel-size with --enable-expert-parallel), lower "
            "eplb_config.num_redundant_experts, or choose a narrower --dtype"
        )
    source = f"gpu_memory_utilization {share:g} of --memory-bytes {memory_bytes:,}, less {size.weights:,} of weights"
    return Room(usable - size.weights, source)
