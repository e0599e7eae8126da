"""What an all-to-all backend must be able to carry, and what each can: known before a process is started. No torch.

Shape letters: P physical experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from moe_serve.base.errors import ConfigError
from moe_serve.base.model_config import ModelConfig
from moe_serve.base.topology import Topology
from moe_serve.model.partition import Partition

QUANTISED_COLUMNS = 128
"""A scale for so many of a row: moe_kernels.quantise."""


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Which rank of the group computes which physical expert.

    `offsets` (one per rank plus one): rank r owns slots [offsets[r], offsets[r + 1]). None: every rank holds a slice
    of the width of every expert, so each row goes to all ranks and their partial results are summed.
    """

    num_physical: int
    offsets: tuple[int, ...] | None

    def first_slot(self, rank: int) -> int:
        """The lowest slot that a rank computes."""
        return 0 if self.offsets is None else self.offsets[rank]

    def num_local(self, rank: int) -> int:
        if self.offsets is None:
            return self.num_physical
        return self.offsets[rank + 1] - self.offsets[rank]


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchShape:
    """The largest exchange there can be; a backend may size its buffers by it once.

    `max_rows` that one rank brings to a layer. `dtype` of the rows as config.json names types; `quantisation` of them
    on the wire (None: none). `graph`: the exchange is captured in a CUDA graph. `device` is auto where it is not known
    yet. `path` of moe_kernels for what is computed on the way, torch's own operations if None.
    """

    max_rows: int
    num_ranks: int
    hidden: int
    top_k: int
    dtype: str
    quantisation: str | None = None
    graph: bool = False
    device: str = "auto"
    path: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a backend can carry. None and the defaults mean: whatever comes, but neither graphs nor quantised rows.

    `rank_counts`, `hidden_sizes`: no others.

    `equal_slots`: every rank must own equally many. `whole_experts`: experts must not be cut by width. `host_memory`:
    by what the ranks of a host hand memory to each other, past the network, so that they must not be in containers
    of their own; `one_host`: there is no other way. `fallback`: the backend that stands in where it finds no memory.
    """

    max_rows: int | None = None
    max_ranks: int | None = None
    rank_counts: tuple[int, ...] | None = None
    max_top_k: int | None = None
    hidden_multiple: int = 1
    hidden_sizes: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    quantisations: tuple[str, ...] = ()
    graphs: bool = False
    equal_slots: bool = False
    whole_experts: bool = False
    host_memory: str | None = None
    one_host: bool = False
    devices: tuple[str, ...] | None = None
    fallback: str | None = None


LIMITS: Mapping[str, Limits] = MappingProxyType(
    {
        "naive": Limits(),
        "allgather_reducescatter": Limits(),
        "torch_a2a": Limits(),
        "torch_padded": Limits(),
        "shm": Limits(
            max_ranks=128,
            devices=("cpu",),
            host_memory="file descriptors",
            one_host=True,
            fallback="allgather_reducescatter",
        ),
        "deepep_high_throughput": Limits(
            rank_counts=(2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160),
            hidden_multiple=8,
            dtypes=("bfloat16",),
            quantisations=("fp8",),
            equal_slots=True,
            whole_experts=True,
            host_memory="CUDA IPC",
            devices=("cuda",),
        ),
        "deepep_v2": Limits(
            max_ranks=1024,
            max_top_k=32,
            hidden_multiple=8,
            dtypes=("bfloat16",),
            quantisations=("fp8",),
            equal_slots=True,
            whole_experts=True,
            devices=("cuda",),
        ),
        "deepep_low_latency": Limits(
            max_rows=1024,
            max_top_k=11,
            hidden_sizes=(2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192),
            dtypes=("bfloat16",),
            quantisations=("fp8",),
            graphs=True,
            equal_slots=True,
            whole_experts=True,
            host_memory="CUDA IPC",
            devices=("cuda",),
        ),
    }
)
"""Of every backend in base.tables.ALL2ALL. Beside the classes, since those need torch and this must not."""
PLANNED_LIMITS: Mapping[str, Limits] = MappingProxyType(
    {
        "pplx": Limits(host_memory="CUDA IPC"),
        "flashinfer_all2allv": Limits(host_memory="file descriptors passed under one host name"),
    }
)
"""Of the names that are known but not built: what their libraries need of a host, and nothing else yet."""


def backends_for(device: str) -> list[str]:
    """Names of those whose ranks may compute on `device`, in the order of the table."""
    return [name for name, each in LIMITS.items() if each.devices is None or device in each.devices]


def check_containers(backend: str, *, containers: int, hosts_apart: bool) -> None:
    """ConfigError if the ranks of a backend cannot do without each other's memory in so many containers.

    `hosts_apart`: no host has two of them. Planned names are known too; what is unknown is refused elsewhere.
    """
    limits = LIMITS.get(backend) or PLANNED_LIMITS.get(backend)
    if limits is None or limits.host_memory is None or containers == 1 or (hosts_apart and not limits.one_host):
        return
    others = ", ".join(name for name, each in LIMITS.items() if each.host_memory is None)
    way = (
        "which cannot leave a host: put all ranks of the world in one pod (--shape node with "
        "--data-parallel-size-local as large as --data-parallel-size)"
        if limits.one_host
        else "which does not reach from one pod to another, not even on one host: put the ranks of a host in one pod "
        "(--shape node with --data-parallel-size-local)"
    )
    raise ConfigError(
        f"all2all_backend {backend} hands memory to the ranks of its host by {limits.host_memory}, {way}, or choose a "
        f"backend that needs nothing but the network ({others}; option --all2all-backend)"
    )


def check_dispatch(backend: str, shape: DispatchShape, layout: ExpertLayout, limits: Limits | None = None) -> None:
    """ConfigError, with what would help, if a backend cannot carry this. `limits` are the backend's own if None."""
    limits = limits or LIMITS[backend]
    for wrong, sentence in (*_sizes(shape, limits), *_kinds(shape, limits), *_layouts(layout, limits)):
        if wrong:
            raise ConfigError(f"--all2all-backend {backend} {sentence}")


def _sizes(shape: DispatchShape, limits: Limits) -> list[tuple[bool, str]]:
    return [
        (
            limits.max_rows is not None and shape.max_rows > limits.max_rows,
            f"carries at most {limits.max_rows} rows of a rank, but a step may have {shape.max_rows}; lower "
            "--max-num-batched-tokens",
        ),
        (
            limits.max_ranks is not None and shape.num_ranks > limits.max_ranks,
            f"joins at most {limits.max_ranks} ranks, but data x tensor parallel is {shape.num_ranks}; use fewer, or "
            "another backend",
        ),
        (
            limits.rank_counts is not None and shape.num_ranks not in limits.rank_counts,
            f"joins {_listed(limits.rank_counts or ())} ranks, but data x tensor parallel is {shape.num_ranks}; use as "
            "many, or another backend",
        ),
        (
            limits.max_top_k is not None and shape.top_k > limits.max_top_k,
            f"sends a row to at most {limits.max_top_k} experts, but the model chooses {shape.top_k}; use another "
            "backend",
        ),
        (
            shape.hidden % limits.hidden_multiple != 0,
            f"needs a hidden size that is a multiple of {limits.hidden_multiple}, but the model's is {shape.hidden}; "
            "use another backend",
        ),
        (
            limits.hidden_sizes is not None and shape.hidden not in limits.hidden_sizes,
            f"is compiled for hidden sizes of {_listed(limits.hidden_sizes or ())}, but the model's is {shape.hidden}; "
            "use another backend",
        ),
    ]


def _listed(numbers: Sequence[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, numbers[:-1])), str(numbers[-1]) if numbers else "")))


def _kinds(shape: DispatchShape, limits: Limits) -> list[tuple[bool, str]]:
    return [
        (
            limits.dtypes is not None and shape.dtype not in limits.dtypes,
            f"carries {', '.join(limits.dtypes or ())}, not {shape.dtype}; choose another --dtype",
        ),
        (
            shape.quantisation is not None and shape.quantisation not in limits.quantisations,
            f"does not carry rows quantised as {shape.quantisation}; leave out --all2all-dtype, or use one that does "
            f"({', '.join(name for name, each in LIMITS.items() if shape.quantisation in each.quantisations)})",
        ),
        (
            shape.quantisation is not None and shape.hidden % QUANTISED_COLUMNS != 0,
            f"quantises rows by {QUANTISED_COLUMNS} columns, but the model's hidden size is {shape.hidden}; leave out "
            "--all2all-dtype",
        ),
        (
            limits.devices is not None and shape.device not in ("auto", *limits.devices),
            f"is for ranks that compute on {' or '.join(limits.devices or ())}, not on {shape.device}; choose another "
            "--device, or another backend",
        ),
        (shape.graph and not limits.graphs, "cannot run inside a CUDA graph; use another backend"),
    ]


def _layouts(layout: ExpertLayout, limits: Limits) -> list[tuple[bool, str]]:
    offsets = layout.offsets
    sizes = set() if offsets is None else {layout.num_local(rank) for rank in range(len(offsets) - 1)}
    return [
        (
            limits.whole_experts and offsets is None,
            "moves rows to whole experts, but here every rank holds a part of each; add --enable-expert-parallel",
        ),
        (
            limits.equal_slots and len(sizes) > 1,
            f"needs as many experts on every rank, but {layout.num_physical} are shared out unequally; choose "
            "--eplb-config.num-redundant-experts so that the ranks divide them",
        ),
    ]


def expert_layout(partition: Partition) -> ExpertLayout:
    """Who computes which expert: by the placement, or everybody a slice of all."""
    placement = partition.placement
    if placement is None:
        return ExpertLayout(partition.config.num_experts, None)
    return ExpertLayout(placement.num_physical, placement.offsets)


def dispatch_shape(
    model: ModelConfig, topology: Topology, *, max_tokens: int, dtype: str, wire: str, device: str
) -> DispatchShape:
    """Of engines whose steps have at most `max_tokens` tokens, cut over their tensor ranks; `wire` as all2all_dtype."""
    return DispatchShape(
        max_rows=-(-max_tokens // topology.tp),
        num_ranks=topology.ep,
        hidden=model.hidden_size,
        top_k=model.top_k,
        dtype=dtype,
        quantisation=None if wire == "auto" else wire,
        device=device,
    )
