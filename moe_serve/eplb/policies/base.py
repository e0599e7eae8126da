"""What a load-balancing policy is given and gives: a pure function from loads and the present placement to a new one.

L layers, E logical experts, P physical slots, R ranks, N nodes. Policies are listed in `EPLB_POLICIES`
(base/tables.py); each is one file in this folder. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moe_serve.base.errors import ConfigError
from moe_serve.eplb.nodes import NodeSizes, even_nodes, nodes_of_ranks
from moe_serve.eplb.placement import Ints, Placement, even_offsets, initial_placement

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Problem:
    """Loads to balance. `load_LE` is float64 (L, E): tokens that chose each expert, any unit, finite, not negative.

    `offsets` are the slot offsets of the ranks (as in Placement); `num_groups` the groups of neighbouring experts
    that the router picks from (1: none); `seed` is for policies that draw lots. `node_sizes` are never () once made.
    """

    load_LE: Floats
    offsets: tuple[int, ...]
    node_sizes: NodeSizes = ()
    num_groups: int = 1
    current: Placement | None = None
    seed: int = 0
    node_of_rank: Ints = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "load_LE", check_load(self.load_LE))
        object.__setattr__(self, "node_sizes", self.node_sizes or (self.num_ranks,))
        self._check_sizes()
        object.__setattr__(self, "node_of_rank", nodes_of_ranks(self.node_sizes))

    @property
    def num_layers(self) -> int:
        return int(self.load_LE.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.load_LE.shape[1])

    @property
    def num_ranks(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_nodes(self) -> int:
        return len(self.node_sizes)

    @property
    def num_physical(self) -> int:
        return self.offsets[-1]

    @property
    def slots_of_ranks(self) -> Ints:
        """int64 (R,): slots of each rank."""
        return np.diff(self.offsets)

    def start(self) -> Placement:
        """The present placement, or the one a world starts with."""
        return self.current or initial_placement(
            "linear",
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            num_ranks=self.num_ranks,
            num_redundant=self.num_physical - self.num_experts,
        )

    def _check_sizes(self) -> None:
        experts, ranks, redundant = self.num_experts, self.num_ranks, self.num_physical - self.num_experts
        holders = int(np.count_nonzero(self.slots_of_ranks))
        if redundant < 0:
            raise ConfigError(f"{self.num_physical} slots cannot hold {experts} experts; the redundancy must be >= 0")
        if self.num_physical > experts * holders:
            raise ConfigError(
                f"{redundant} redundant experts cannot fit: {experts} experts on {ranks} ranks have room for at most "
                f"{experts * (holders - 1)}, when every rank holds every expert"
            )
        if sum(self.node_sizes) != ranks or min(self.node_sizes) < 1:
            raise ConfigError(f"nodes of {list(self.node_sizes)} ranks do not add up to the {ranks} ranks of the world")
        if self.num_groups < 1 or experts % self.num_groups:
            raise ConfigError(f"the number of groups must divide the {experts} experts, not {self.num_groups}")
        if self.current is not None:
            mine = (self.num_layers, experts, self.offsets)
            theirs = (self.current.num_layers, self.current.num_logical, self.current.offsets)
            if mine != theirs:
                raise ConfigError(
                    f"the present placement is of another model or world: {theirs[0]} layers, {theirs[1]} experts, "
                    f"{self.current.num_physical} slots on {self.current.num_ranks} ranks; the load and the options "
                    f"say {mine[0]} layers, {experts} experts, {self.num_physical} slots on {ranks} ranks"
                )


class Policy(Protocol):
    def __call__(self, problem: Problem) -> Placement:
        """A placement that passes `check()`, with the problem's offsets. Same problem, same answer."""
        ...


def problem_of(
    load_LE: npt.NDArray[np.generic],
    *,
    num_ranks: int,
    num_redundant: int = 0,
    num_nodes: int = 1,
    num_groups: int = 1,
    current: Placement | None = None,
    seed: int = 0,
) -> Problem:
    """The usual problem: slots spread over the ranks as evenly as they go. Raises ConfigError."""
    load = check_load(load_LE)
    if num_ranks < 1:
        raise ConfigError(f"the number of ranks must be at least 1, not {num_ranks}")
    if num_redundant < 0:
        raise ConfigError(f"the number of redundant experts must not be negative, not {num_redundant}")
    offsets = current.offsets if current is not None else even_offsets(load.shape[1] + num_redundant, num_ranks)
    if offsets[-1] != load.shape[1] + num_redundant or len(offsets) != num_ranks + 1:
        offsets = even_offsets(load.shape[1] + num_redundant, num_ranks)  # refused with the sizes of both
    return Problem(load, offsets, even_nodes(num_ranks, num_nodes), num_groups, current, seed)


def check_load(load: npt.NDArray[np.generic]) -> Floats:
    """The load as float64 (L, E); ConfigError for another shape, NaN, infinity, negatives and zeros everywhere."""
    if load.ndim != 2 or not load.size:
        raise ConfigError(f"the load must have the shape [layers, experts], not {list(load.shape)}")
    if load.dtype.kind not in "iuf":
        raise ConfigError(f"the load must hold numbers, not {load.dtype}")
    values = np.ascontiguousarray(load, dtype=np.float64)
    if not np.isfinite(values).all():
        layer, expert = np.argwhere(~np.isfinite(values))[0]
        raise ConfigError(f"the load of expert {expert} in layer {layer} is {values[layer, expert]}, not finite")
    if values.min() < 0:
        layer, expert = np.argwhere(values < 0)[0]
        raise ConfigError(f"the load of expert {expert} in layer {layer} is {values[layer, expert]:g}, below zero")
    if not values.any():
        raise ConfigError("the load is zero everywhere: nothing was recorded, so there is nothing to balance")
    return values
