"""One rank's decoder run by hand, without scheduler or worker: prompts in, logits of every position out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_serve.base.config import Config
from moe_serve.base.model_config import load_model_config
from moe_serve.base.topology import Topology
from moe_serve.model.attention.base import StepShape
from moe_serve.model.build import build_model
from moe_serve.model.context import ForwardContext
from moe_serve.model.decoder import Decoder
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.groups import Groups, build_groups
from moe_serve.worker.inputs import rows_by_ep_rank
from moe_serve.worker.kv_cache import KVShape
from moe_serve.worker.loading.loader import load_weights
from moe_serve.worker.loading.tied_head import settle_head
from tests.support.ranks import Seat

CPU = torch.device("cpu")
BLOCK_SIZE = 4
MAX_TOKENS = 1 << 16


def alone() -> Groups:
    """The groups of a world of one."""
    return build_groups(Topology(), 0, store_host="", store_port=0, token="", device=CPU)


def idle_groups(topology: Topology, rank: int) -> Groups:
    """Groups of the right sizes that cannot be used: for building and filling any rank's model in one process."""

    def group(name: str, ranks: tuple[int, ...]) -> Group:
        nobody: Any = object()
        return Group(nobody, name=name, rank=ranks.index(rank), ranks=ranks, device=CPU, timeout_seconds=0)

    world = group("world", tuple(range(topology.world_size)))
    axes = ("dp", "pp", "tp", "ep", "dcp")
    dp, pp, tp, ep, dcp = (group(axis, getattr(topology, f"{axis}_group")(rank)) for axis in axes)
    return Groups(world, dp, pp, tp, ep, dcp, world, [])


def empty_decoder(
    folder: Path,
    rank: int = 0,
    *,
    groups: Groups | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    options: dict[str, object] | None = None,
    path: str | None = None,
) -> Decoder:
    """A rank's decoder under some parallel options, not filled; with idle groups if none are given."""
    parallel = Config.from_flat({"all2all_backend": "allgather_reducescatter"} | (options or {})).parallel
    groups = groups or idle_groups(parallel.topology, rank)
    config = settle_head(load_model_config(folder), folder, dtype)
    return build_model(config, parallel, rank, groups, dtype=dtype, device=device, max_tokens=MAX_TOKENS, path=path)


def load_decoder(
    folder: Path,
    groups: Groups,
    rank: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    options: dict[str, object] | None = None,
    path: str | None = None,
) -> Decoder:
    """A rank's decoder of a checkpoint under some parallel options, filled."""
    decoder = empty_decoder(folder, rank, groups=groups, dtype=dtype, device=device, options=options, path=path)
    load_weights(decoder, folder)
    return decoder


def rank_logits(
    seat: Seat, folder: Path, prompts: list[list[list[int]]], chunk: int | None, options: dict[str, object]
) -> list[npt.NDArray[np.float32]]:
    """Runs on a rank: all_logits() of its part of a checkpoint. Here, so that ranks need not import transformers."""
    topology = Config.from_flat(options).parallel.topology
    decoder = load_decoder(folder, seat.groups(topology), seat.rank, options=options)
    return [logits.numpy() for logits in all_logits(decoder, prompts, chunk=chunk, topology=topology, rank=seat.rank)]


def all_logits(
    decoder: Decoder,
    prompts_by_dp_rank: list[list[list[int]]],
    *,
    chunk: int | None = None,
    topology: Topology | None = None,
    rank: int = 0,
    forward: Callable[[Tensor, ForwardContext], Tensor] | None = None,
) -> list[Tensor]:
    """(tokens, V) float32 for each prompt of this rank's engine, `chunk` tokens of each a step (None: whole prompts).

    `forward` in place of the decoder's own.

    All ranks call this with the same prompts; an engine whose prompts are done takes dummy steps. Sequences get their
    blocks interleaved, the last first, so that no sequence's blocks are neighbours.
    """
    topology = topology or Topology()
    dp_rank, _, _ = topology.coordinates(rank)
    prompts = prompts_by_dp_rank[dp_rank]
    longest = max(len(prompt) for group in prompts_by_dp_rank for prompt in group)
    chunk = chunk or longest
    shape = KVShape(decoder.token_kv, BLOCK_SIZE, decoder.dtype, sharing=topology.dcp)
    blocks = -(-longest // BLOCK_SIZE)
    kv = shape.allocate(max(1, blocks * len(prompts)), decoder.device)
    tables = [list(range(len(prompts) * blocks))[index :: len(prompts)][::-1] for index in range(len(prompts))]
    found: list[list[Tensor]] = [[] for _ in prompts]
    for start in range(0, longest, chunk):
        counts = [[len(prompt[start : start + chunk]) for prompt in group] for group in prompts_by_dp_rank]
        ours = [(index, count) for index, count in enumerate(counts[dp_rank]) if count]
        ids = [token for index, count in ours for token in prompts[index][start : start + count]]
        positions = [position for _, count in ours for position in range(start, start + count)]
        step = StepShape.of(
            [start] * len(ours), [count for _, count in ours], [tables[index] for index, _ in ours], BLOCK_SIZE
        )
        ctx = ForwardContext(
            positions_T=torch.tensor(positions, dtype=torch.int64, device=decoder.device),
            attention=decoder.attention_backend.plan(step),
            kv=kv,
            rows_by_ep_rank=rows_by_ep_rank([sum(group) for group in counts], topology),
        )
        hidden_TD = (forward or decoder)(torch.tensor(ids, dtype=torch.int64, device=decoder.device), ctx)
        if ours:
            parts = torch.split(decoder.logits(hidden_TD, ctx.progress), [count for _, count in ours])
            for (index, _), part in zip(ours, parts, strict=True):
                found[index].append(part)
    return [torch.cat(parts) for parts in found]
