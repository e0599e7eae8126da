"""What a rank on a CPU takes beside weights and KV stays under what is counted for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moe_serve.worker.kept_memory import CAPACITIES, MOST_KERNELS, bound_kept_kernels, kept_kernel_bytes, logits_bytes

MANY_SHAPES = """
import os, sys
import psutil, torch
from torch.utils import mkldnn
from moe_serve.worker.kept_memory import bound_kept_kernels, kept_kernel_bytes

torch.set_num_threads(1)
if sys.argv[1] == "bound":
    bound_kept_kernels(os.environ)
product = mkldnn.to_mkldnn(torch.nn.Linear(512, 512))
here = psutil.Process()
before = here.memory_info().rss
with torch.no_grad():
    for rows in range(1, 1001):
        product(torch.ones(rows, 512).to_mkldnn())
print(here.memory_info().rss - before, kept_kernel_bytes(os.environ))
"""
"""Products that go to oneDNN on any processor, each of as many rows as none before, in a torch imported before."""


def growth(how: str) -> tuple[int, int]:
    """In an environment that says nothing: a worker that ran in this process has said something in ours."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MANY_SHAPES, how],
        env={name: value for name, value in os.environ.items() if name not in CAPACITIES},
        capture_output=True,
        text=True,
        check=True,
    )
    grown, counted = map(int, ran.stdout.split())
    return grown, counted


@pytest.mark.long
def test_a_thousand_shapes_take_no_more_than_is_counted_and_would_unbounded() -> None:
    grown, counted = growth("bound")
    assert grown < counted == MOST_KERNELS * 2**20
    unbounded, _ = growth("unbounded")
    assert unbounded > counted


def test_what_the_operator_says_stays_and_is_what_counts() -> None:
    environment = {CAPACITIES[1]: "500"}
    bound_kept_kernels(environment)
    assert environment == {CAPACITIES[0]: str(MOST_KERNELS), CAPACITIES[1]: "500"}
    assert kept_kernel_bytes(environment) == 500 * 2**20
    assert kept_kernel_bytes({CAPACITIES[0]: "many", CAPACITIES[1]: "1"}) == kept_kernel_bytes({}) == 2**30


def test_logits_are_counted_for_the_rows_that_a_step_can_have() -> None:
    assert logits_bytes(num_seqs=256, num_tokens=2048, vocab_size=1000) == 256 * 1000 * 8
    assert logits_bytes(num_seqs=256, num_tokens=16, vocab_size=1000) == 16 * 1000 * 8
