"""How many files and sockets a process may have open."""

from __future__ import annotations

import resource


def raise_descriptor_limit() -> int:
    """Allow this process and its children as many open files as the system lets it; the number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 2**20
