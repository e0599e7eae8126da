"""How many GPUs this process may use, known without torch: an executor is chosen before anything loads that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def gpus_here(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """NVIDIA's, by their files; not more than CUDA_VISIBLE_DEVICES names, where it is set. 0 for any others."""
    here = sum(file.name.removeprefix("nvidia").isdecimal() for file in devices.glob("nvidia*"))
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return here
    return min(here, sum(each.strip() not in ("", "-1") for each in named.split(",")))
