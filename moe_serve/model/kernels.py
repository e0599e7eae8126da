"""Which compiled path of moe_kernels a rank's layers run on, or None for torch's own operations."""

from __future__ import annotations

import logging

import torch
from moe_kernels.linear.packing import can_pack
from moe_kernels.paths import available, why_none

from moe_serve.base.errors import ConfigError
from moe_serve.parallel.collectives import Group

SLOWEST_FIRST = ("torch", "generic", "avx2", "avx512_bf16", "avx512", "amx")
BY_NAME_ONLY = ("generic", "avx512_bf16")
"""auto leaves these out: the first is slower than torch, the second slower than avx512 where both were measured."""
log = logging.getLogger(__name__)


def choose_kernels(asked: str, dtype: torch.dtype, device: torch.device, group: Group) -> str | None:
    """What `--kernels` says, for auto the best that all ranks of `group` can run; the same on all of them.

    The compiled operations are for bfloat16 on CPUs. ConfigError where a path is asked for that cannot run.
    """
    here = available()
    fits = dtype == torch.bfloat16 and device.type == "cpu"
    if asked not in ("auto", "torch"):
        if asked not in here:
            has = f"has {', '.join(here)}" if here else f"has none compiled ({why_none()})"
            raise ConfigError(f"kernels {asked} cannot run here: this machine {has}; choose --kernels auto or torch")
        if not fits:
            raise ConfigError(
                f"kernels {asked} are for bfloat16 on a CPU, not {str(dtype).removeprefix('torch.')} on {device.type}; "
                "choose --kernels auto or torch, or --dtype bfloat16"
            )
        return asked
    if not fits or asked == "torch":
        return None
    if not here:
        log.warning(
            "no compiled kernels (%s): torch computes alone, slower; install a C++ compiler and reinstall", why_none()
        )
    best = next((path for path in here if path not in BY_NAME_ONLY), "torch")
    told = torch.tensor([SLOWEST_FIRST.index(best)])
    agreed = SLOWEST_FIRST[int(group.all_reduce_min(told))]
    return None if agreed == "torch" else agreed


def path_for(path: str | None, num_rows: int, num_columns: int) -> str | None:
    """`path` for a weight (N, K), or None where its shape cannot be packed."""
    if path is None or can_pack(num_rows, num_columns):
        return path
    if num_rows:
        log.warning("weights of %d x %d are no multiple of 16: torch computes with them, slower", num_rows, num_columns)
    return None
