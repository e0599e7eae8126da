"""Problems for the balancing policies: random small ones and the enumeration of all answers."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from moe_serve.eplb.placement import Placement
from moe_serve.eplb.policies.base import Floats, Problem, problem_of
from moe_serve.eplb.search.scores import mean_of_ratios, rank_loads


@st.composite
def problems(draw: st.DrawFn, *, most_experts: int = 12, most_ranks: int = 5) -> Problem:
    """Any experts, ranks, nodes of any sizes, redundancy that fits, and loads with zeros and ties."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, most_experts))
    ranks = draw(st.integers(1, most_ranks))
    holders = min(ranks, experts)  # with fewer experts than ranks, some ranks may be empty
    redundant = draw(st.integers(0, min(experts * (holders - 1), 2 * experts)))
    loads = st.lists(st.integers(0, 20), min_size=experts, max_size=experts)
    load_LE = np.array(draw(st.lists(loads, min_size=layers, max_size=layers)), dtype=np.float64)
    load_LE[0, 0] += 1  # not zero everywhere
    groups = draw(st.sampled_from([count for count in range(1, experts + 1) if experts % count == 0]))
    cuts = sorted(draw(st.sets(st.integers(1, ranks - 1)))) if ranks > 1 else []
    sizes = tuple(stop - start for start, stop in pairwise([0, *cuts, ranks]))
    even = problem_of(load_LE, num_ranks=ranks, num_redundant=redundant)
    return Problem(even.load_LE, even.offsets, sizes, groups, seed=draw(st.integers(0, 3)))


def balancedness(problem: Problem, placement: Placement) -> float:
    return mean_of_ratios(rank_loads(problem.load_LE, placement))


def least_peak(load_E: Floats, places: list[int]) -> float:
    """The smallest possible largest rank load, by trying every placement without two copies on a rank."""
    experts = len(load_E)
    best = np.inf

    def place(rank: int, held: list[tuple[int, ...]]) -> None:
        nonlocal best
        if rank == len(places):
            copies = np.bincount([expert for of_rank in held for expert in of_rank], minlength=experts)
            if copies.min() > 0:
                share_E = load_E / copies
                best = min(best, max(sum(share_E[expert] for expert in of_rank) for of_rank in held))
            return
        for chosen in combinations(range(experts), places[rank]):
            place(rank + 1, [*held, chosen])

    place(0, [])
    return float(best)


def arrays(placement: Placement) -> Any:
    return placement.physical_to_logical_LP.tolist()
