"""Policies that nobody should write."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np

from moe_serve.base.errors import ConfigError
from moe_serve.eplb.placement import Placement
from moe_serve.eplb.policies.base import Problem
from moe_serve.eplb.policies.shuffle import shuffle

SLOW_SECONDS = 2.0


def telling_the_world(problem: Problem) -> Placement:
    """Gives no placement, but a sentence that says what it was told."""
    raise ConfigError(f"nodes {problem.node_sizes}, groups {problem.num_groups}")


def raising(problem: Problem) -> Placement:
    """A bug of the kind that is not an error of ours."""
    return len(problem)  # type: ignore[arg-type, return-value]


def slow(problem: Problem) -> Placement:
    """Takes its time and a lock that every thread of its process needs, and prints."""
    sys.stdout.write("a policy may print\n")
    sys.stdout.flush()
    before = sys.getswitchinterval()
    sys.setswitchinterval(10 * SLOW_SECONDS)
    deadline = time.monotonic() + SLOW_SECONDS
    while time.monotonic() < deadline:
        sum(range(1000))
    sys.setswitchinterval(before)
    return shuffle(problem)


def endless(_problem: Problem) -> Placement:
    while True:
        time.sleep(1)


def exiting(_problem: Problem) -> Placement:
    os._exit(3)


def leaving(_problem: Problem) -> Placement:
    sys.exit("enough")


def words(_problem: Problem) -> Any:
    return "nonsense"


def of_another_world(problem: Problem) -> Placement:
    """One layer too many."""
    table = np.tile(problem.start().physical_to_logical_LP[:1], (problem.num_layers + 1, 1))
    return Placement(table, problem.offsets, problem.num_experts)


def in_halves(problem: Problem) -> Placement:
    """Experts that are no whole numbers."""
    return Placement(problem.start().physical_to_logical_LP + 0.5, problem.offsets, problem.num_experts)  # type: ignore[arg-type]


def without_a_table(problem: Problem) -> Placement:
    return Placement(None, problem.offsets, problem.num_experts)  # type: ignore[arg-type]
