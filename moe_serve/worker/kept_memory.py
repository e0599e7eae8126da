"""What a rank on a CPU takes beside weights and KV blocks, bounded so that it can be counted before there is any."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Of oneDNN, which compiles a kernel for each new shape of a product, and of ideep, between it and torch."""
MOST_KERNELS = 256
"""Instead of 1,024, where nobody has said how many. A decode step uses some five for each number of rows."""
KERNEL_BYTES = 2**20
"""Of one shape in both caches; 0.5 to 0.7 MiB were seen."""


def bound_kept_kernels(environment: MutableMapping[str, str]) -> None:
    """Have torch keep fewer kernels, where the operator says nothing.

    `environment` of this process; the libraries read it at their first product, later it changes nothing.
    """
    for name in CAPACITIES:
        environment.setdefault(name, str(MOST_KERNELS))


def kept_kernel_bytes(environment: Mapping[str, str]) -> int:
    """What the kernels take in the end."""
    given = [environment.get(name, "") for name in CAPACITIES]
    return KERNEL_BYTES * max(int(each) if each.isdecimal() else 1024 for each in given)


def logits_bytes(*, num_seqs: int, num_tokens: int, vocab_size: int) -> int:
    """The largest step's logits in float32, and again as the sampler edits them."""
    return 2 * 4 * min(num_seqs, num_tokens) * vocab_size
