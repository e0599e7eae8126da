"""Doubles of libraries that need a GPU: their documented semantics, so that what calls them can be tested without one.

A double is a package of the library's own name in this folder, found once stand_in() was called.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from moe_serve.model.all2all import limits as table

LIBRARIES = {
    **dict.fromkeys(("deepep_high_throughput", "deepep_v2", "deepep_low_latency"), "deep_ep"),
    "pplx": "pplx_kernels",
    "pplx_garden": "pplx_garden",
    **dict.fromkeys(("flashinfer_nvlink_one_sided", "flashinfer_nvlink_two_sided"), "flashinfer"),
}
"""Of each backend the library that it calls."""
FOLDER = str(Path(__file__).parent)


def stand_in(library: str, *, is_open: bool) -> None:
    """Let `library` be its double in this process; `is_open`: sizes and types are free, else the library's own."""
    if FOLDER not in sys.path:
        sys.path.insert(0, FOLDER)
    import_module(library).OPEN = is_open  # type: ignore[attr-defined]


def open_everything() -> None:
    """All doubles, open, and in this process the product's own limits of their backends with them."""
    for library in set(LIBRARIES.values()):
        stand_in(library, is_open=True)
    opened = {
        name: replace(
            limits,
            devices=None,
            dtypes=None,
            hidden_multiple=1,
            hidden_sizes=None,
            quantised_multiple=128,
            rank_counts=None,
            max_rows=None,
            top_ks=None,
        )
        for name, limits in table.LIMITS.items()
        if name in LIBRARIES
    }
    table.LIMITS = {**table.LIMITS, **opened}
