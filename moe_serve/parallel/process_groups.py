"""torch's process groups, made directly: no call here (or anywhere in the product) uses its default group."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.distributed import Work

from moe_serve.base.errors import ConfigError, EngineError
from moe_serve.parallel.listeners import deafen, listeners
from moe_serve.parallel.store import PrefixStore, Store, first_line, local_address, open_store, wait_for_ranks


class ProcessGroup(Protocol):
    """What ProcessGroupGloo and ProcessGroupNCCL have and this package uses (torch's stubs omit it)."""

    def allreduce(self, tensors: list[Tensor], opts: Any = ...) -> Work: ...
    def broadcast(self, tensors: list[Tensor], opts: Any = ...) -> Work: ...
    def alltoall_base(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int]
    ) -> Work: ...
    def _allgather_base(self, output: Tensor, input: Tensor) -> Work: ...
    def _reduce_scatter_base(self, output: Tensor, input: Tensor) -> Work: ...
    def send(self, tensors: list[Tensor], to: int, tag: int) -> Work: ...
    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Work: ...
    def rank(self) -> int: ...
    def size(self) -> int: ...
    def shutdown(self) -> None: ...


def init_process_group(
    host: str,
    port: int,
    rank: int,
    size: int,
    *,
    backend: Literal["gloo", "nccl"] = "gloo",
    name: str = "group",
    token: str = "",
    timeout_seconds: float = 300.0,
) -> ProcessGroup:
    """A torch process group that meets at host:port, where rank 0 keeps the store. Drop it to end it."""
    store, port = open_store(host, port, is_master=rank == 0, token=token, timeout_seconds=timeout_seconds)
    return join_process_group(
        store,
        name=name,
        rank=rank,
        size=size,
        backend=backend,
        listen_host=local_address(host, port),
        timeout_seconds=timeout_seconds,
    )


def join_process_group(
    store: Store,
    *,
    name: str,
    rank: int,
    size: int,
    backend: Literal["gloo", "nccl"],
    listen_host: str,
    timeout_seconds: float,
) -> ProcessGroup:
    """Form a torch process group through a store its ranks share; gloo listens on `listen_host` only.

    Every rank counts how often it has formed a group of this name, so a destroyed group can be formed again.
    """
    generation = store.add(f"{name}/joined/{rank}", 1)
    prefix = f"{name}/{generation}"
    store.set(f"{prefix}/here/{rank}", "1")
    keys = {peer: f"{prefix}/here/{peer}" for peer in range(size)}
    wait_for_ranks(store, keys, timeout=timeout_seconds, what=f"forming group {name!r} in its rank {rank}")
    inner, limit = PrefixStore(prefix, store), timedelta(seconds=timeout_seconds)
    try:
        if backend == "gloo":
            return _gloo(inner, rank, size, listen_host, limit)
        return _nccl(inner, rank, size, limit)
    except RuntimeError as error:
        raise EngineError(f"cannot form group {name!r} in its rank {rank}: {first_line(error)}") from error


def _gloo(store: Store, rank: int, size: int, host: str, limit: timedelta) -> ProcessGroup:
    before = listeners()
    gloo: Any = torch.distributed.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = limit
    group = cast(ProcessGroup, gloo(store, rank, size, options))
    deafen(listeners() - before)  # all have met, and gloo runs out of descriptors where strangers knock
    return group


def _nccl(store: Store, rank: int, size: int, limit: timedelta) -> ProcessGroup:
    if not torch.distributed.is_nccl_available():
        raise ConfigError("this torch was built without NCCL; groups on it need --device cpu")
    nccl: Any = torch.distributed.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = limit
    return cast(ProcessGroup, nccl(store, rank, size, options))
