"""Rank arithmetic: who is who on the axes dp x pp x tp, and how ranges are shared out. Pure integers.

Global rank = (dp * pp_size + pp) * tp_size + tp. The expert-parallel axis of a pipeline stage joins dp and tp:
ep = dp * tp_size + tp. Within its engine (one dp) a rank is a worker, by index pp * tp_size + tp.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_serve.base.errors import ConfigError


def divide(numerator: int, denominator: int) -> int:
    """Exact division; ValueError if there is a remainder."""
    if numerator % denominator:
        raise ValueError(f"{numerator} is not divisible by {denominator}")
    return numerator // denominator


def split_range(total: int, parts: int, index: int) -> range:
    """Part `index` of range(total) cut into `parts` neighbours whose sizes differ by at most one, larger first."""
    if not 0 <= index < parts:
        raise ValueError(f"part {index} is outside [0, {parts})")
    base, remainder = divmod(total, parts)
    start = index * base + min(index, remainder)
    return range(start, start + base + (index < remainder))


def get_pp_indices(num_layers: int, pp_rank: int, pp_size: int) -> tuple[int, int]:
    """First and one-past-last layer of a pipeline stage.

    Remainder layers go to the middle stages from the back, then to the first, never to the last stage (it also
    computes the logits).
    """
    if not 0 <= pp_rank < pp_size:
        raise ValueError(f"pipeline rank {pp_rank} is outside [0, {pp_size})")
    if num_layers < pp_size:
        raise ValueError(f"{num_layers} layers cannot be spread over {pp_size} pipeline stages")
    base, remainder = divmod(num_layers, pp_size)
    counts = [base] * pp_size
    for back in range(remainder):
        counts[pp_size - 2 - back] += 1
    start = sum(counts[:pp_rank])
    return start, start + counts[pp_rank]


@dataclass(frozen=True, slots=True)
class Topology:
    """Sizes of the axes. `Topology(dp=2, tp=2).world_size == 4`.

    The workers of each engine are spread over so many `nodes`, neighbours on the same one. One where engines are not
    spread, wherever they are themselves. Neighbours on the tp axis, `dcp` of them, share a sequence's KV cache.
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1
    nodes: int = 1
    dcp: int = 1

    def __post_init__(self) -> None:
        for axis in ("dp", "pp", "tp", "nodes", "dcp"):
            if getattr(self, axis) < 1:
                raise ConfigError(f"the size of axis {axis} must be at least 1, not {getattr(self, axis)}")
        if self.num_workers % self.nodes:
            raise ConfigError(f"{self.num_workers} workers cannot be shared out evenly among {self.nodes} nodes")

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.dp * self.pp * self.tp

    @property
    def ep(self) -> int:
        """Ranks that share the experts of one layer."""
        return self.dp * self.tp

    @property
    def num_workers(self) -> int:
        """Ranks of one engine."""
        return self.pp * self.tp

    @property
    def sampling_worker(self) -> int:
        """The worker whose tokens an engine takes: the first tensor rank of the last pipeline stage."""
        return (self.pp - 1) * self.tp

    def workers_of_node(self, node: int) -> range:
        """Workers of an engine that are on one of the nodes it is spread over."""
        each = self.num_workers // self.nodes
        return range(node * each, (node + 1) * each)

    def node_of(self, worker: int) -> int:
        """On which of its engine's nodes a worker is."""
        return worker * self.nodes // self.num_workers

    def rank(self, *, dp: int, pp: int = 0, tp: int = 0) -> int:
        """The global rank at these coordinates."""
        for value, size, axis in ((dp, self.dp, "dp"), (pp, self.pp, "pp"), (tp, self.tp, "tp")):
            if not 0 <= value < size:
                raise ValueError(f"{axis} rank {value} is outside [0, {size})")
        return (dp * self.pp + pp) * self.tp + tp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(dp, pp, tp) of a global rank."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside [0, {self.world_size})")
        rest, tp = divmod(rank, self.tp)
        dp, pp = divmod(rest, self.pp)
        return dp, pp, tp

    def worker_rank(self, dp: int, worker: int) -> int:
        """The global rank of an engine's worker."""
        if not 0 <= worker < self.num_workers:
            raise ValueError(f"worker {worker} is outside [0, {self.num_workers})")
        pp, tp = divmod(worker, self.tp)
        return self.rank(dp=dp, pp=pp, tp=tp)

    def worker_index(self, rank: int) -> int:
        """Which of its engine's workers a global rank is."""
        _, pp, tp = self.coordinates(rank)
        return pp * self.tp + tp

    def ep_rank(self, rank: int) -> int:
        """Place of a global rank among those that share its layers' experts."""
        dp, _, tp = self.coordinates(rank)
        return dp * self.tp + tp

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """Global ranks of this rank's tensor-parallel group, in order."""
        dp, pp, _ = self.coordinates(rank)
        return tuple(self.rank(dp=dp, pp=pp, tp=tp) for tp in range(self.tp))

    def dcp_group(self, rank: int) -> tuple[int, ...]:
        """Global ranks that share this rank's KV cache, in order of tp."""
        _, _, tp = self.coordinates(rank)
        first = tp // self.dcp * self.dcp
        return self.tp_group(rank)[first : first + self.dcp]

    def dp_group(self, rank: int) -> tuple[int, ...]:
        """Global ranks with the same pp and tp as this one, in order of dp."""
        _, pp, tp = self.coordinates(rank)
        return tuple(self.rank(dp=dp, pp=pp, tp=tp) for dp in range(self.dp))

    def pp_group(self, rank: int) -> tuple[int, ...]:
        """Global ranks with the same dp and tp as this one, in order of pipeline stage."""
        dp, _, tp = self.coordinates(rank)
        return tuple(self.rank(dp=dp, pp=pp, tp=tp) for pp in range(self.pp))

    def ep_group(self, rank: int) -> tuple[int, ...]:
        """Global ranks that share this rank's experts, in order of ep rank."""
        _, pp, _ = self.coordinates(rank)
        return tuple(self.rank(dp=dp, pp=pp, tp=tp) for dp in range(self.dp) for tp in range(self.tp))

    def describe(self, rank: int) -> str:
        """A global rank for people: `rank 3 (dp 1, tp 1)`."""
        dp, pp, tp = self.coordinates(rank)
        middle = f", pp {pp}" if self.pp > 1 else ""
        where = f", node {self.node_of(self.worker_index(rank))}" if self.nodes > 1 else ""
        return f"rank {rank} (dp {dp}{middle}, tp {tp}{where})"

    def describe_worker(self, dp: int, worker: int) -> str:
        """A worker for people: `worker dp 1 tp 1`; by its index if it has no place here."""
        if not 0 <= worker < self.num_workers:
            return f"worker {worker} of dp {dp}"
        pp, tp = divmod(worker, self.tp)
        middle = f" pp {pp}" if self.pp > 1 else ""
        where = f" of node {self.node_of(worker)}" if self.nodes > 1 else ""
        return f"worker dp {dp}{middle} tp {tp}{where}"
