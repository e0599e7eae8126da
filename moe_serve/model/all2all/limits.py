"""What each all-to-all backend can carry, checked with a sentence before a process is started. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from moe_serve.base.errors import ConfigError
from moe_serve.model.all2all.shape import QUANTISED_COLUMNS, DispatchShape, ExpertLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a backend can carry. None and the defaults mean: whatever comes, but neither graphs nor quantised rows.

    `in_flight` exchanges at a time. `rank_counts`, `hidden_sizes`, `top_ks`: no others. `experts_multiple` of physical
    experts, `quantised_multiple` of the hidden size of rows that travel quantised.

    `equal_slots`: every rank must own equally many. `whole_experts`: experts must not be cut by width. `host_memory`:
    by what the ranks of a host hand memory to each other, past the network, so that they must not be in containers
    of their own; `one_host`: there is no other way. `fallback`: the backend that stands in where it finds no memory.
    """

    max_rows: int | None = None
    in_flight: int = 2
    min_ranks: int = 1
    max_ranks: int | None = None
    rank_counts: tuple[int, ...] | None = None
    max_top_k: int | None = None
    top_ks: tuple[int, ...] | None = None
    max_experts: int | None = None
    experts_multiple: int = 1
    hidden_multiple: int = 1
    hidden_sizes: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    quantisations: tuple[str, ...] = ()
    quantised_multiple: int = QUANTISED_COLUMNS
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
        "pplx": Limits(
            in_flight=1,
            min_ranks=2,
            hidden_multiple=8,
            dtypes=("bfloat16", "float16"),
            quantisations=("fp8",),
            quantised_multiple=512,
            graphs=True,
            equal_slots=True,
            whole_experts=True,
            host_memory="CUDA IPC",
            one_host=True,
            devices=("cuda",),
        ),
        "pplx_garden": Limits(
            in_flight=1,
            max_experts=512,
            hidden_multiple=8,
            dtypes=("bfloat16", "float16"),
            quantisations=("fp8",),
            equal_slots=True,
            whole_experts=True,
            host_memory="CUDA memory found through pidfd_getfd",
            devices=("cuda",),
        ),
        "flashinfer_nvlink_one_sided": Limits(
            in_flight=1,
            max_ranks=64,
            top_ks=(1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 22),
            dtypes=("bfloat16", "float16"),
            quantisations=("fp8",),
            equal_slots=True,
            whole_experts=True,
            host_memory="file descriptors passed under one host name",
            devices=("cuda",),
        ),
        "flashinfer_nvlink_two_sided": Limits(
            in_flight=1,
            max_top_k=32,
            experts_multiple=4,
            hidden_multiple=8,
            dtypes=("bfloat16", "float16"),
            quantisations=("fp8",),
            quantised_multiple=512,
            equal_slots=True,
            whole_experts=True,
            host_memory="file descriptors passed under one host name",
            devices=("cuda",),
        ),
    }
)
"""Of every backend in base.tables.ALL2ALL. Beside the classes, since those need torch and this must not."""


def backends_for(device: str) -> list[str]:
    """Names of those whose ranks may compute on `device`, in the order of the table."""
    return [name for name, each in LIMITS.items() if each.devices is None or device in each.devices]


def check_containers(backend: str, *, containers: int, hosts_apart: bool) -> None:
    """ConfigError if the ranks of a backend cannot do without each other's memory in so many containers.

    `hosts_apart`: no host has two of them. What is unknown is refused elsewhere.
    """
    limits = LIMITS.get(backend)
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
            shape.num_ranks < limits.min_ranks,
            f"joins at least {limits.min_ranks} ranks, but data x tensor parallel is {shape.num_ranks}; use more, or "
            "another backend",
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
            limits.top_ks is not None and shape.top_k not in limits.top_ks,
            f"is compiled for {_listed(limits.top_ks or ())} experts of a row, but the model chooses {shape.top_k}; "
            "use another backend",
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
            shape.quantisation is not None and shape.hidden % limits.quantised_multiple != 0,
            f"quantises rows whose hidden size is a multiple of {limits.quantised_multiple}, but the model's is "
            f"{shape.hidden}; leave out --all2all-dtype",
        ),
        (
            limits.devices is not None and shape.device not in ("auto", *limits.devices),
            f"is for ranks that compute on {' or '.join(limits.devices or ())}, not on {shape.device}; choose another "
            "--device, or another backend",
        ),
        (
            shape.in_flight > limits.in_flight,
            "carries one exchange at a time, so that halves of a step cannot take turns; leave out --enable-dbo, or "
            "use another backend",
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
            limits.max_experts is not None and layout.num_physical > limits.max_experts,
            f"knows at most {limits.max_experts} physical experts, but there are {layout.num_physical}; lower "
            "--eplb-config.num-redundant-experts, or use another backend",
        ),
        (
            layout.num_physical % limits.experts_multiple != 0,
            f"needs a number of physical experts that is a multiple of {limits.experts_multiple}, but there are "
            f"{layout.num_physical}; choose --eplb-config.num-redundant-experts so that it is",
        ),
        (
            limits.equal_slots and len(sizes) > 1,
            f"needs as many experts on every rank, but {layout.num_physical} are shared out unequally; choose "
            "--eplb-config.num-redundant-experts so that the ranks divide them",
        ),
    ]
