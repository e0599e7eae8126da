"""Which all-to-all backend `auto` is: by where the ranks are and what they compute on, before a process is started.

Pure, but for this_machine(). No torch.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_serve.base.errors import ConfigError
from moe_serve.base.launched import EXTERNAL_LAUNCHER
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.parallel.flags import why_no_flags

AUTO = "auto"
ANYWHERE, SAME_MACHINE = "allgather_reducescatter", "shm"
GPU_FILES = ("nvidia0", "nvidiactl", "kfd", "dxg")
"""In /dev, where there may be a GPU that torch can use."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a choice depends on of the machine that it is made on."""

    system: str
    processor: str
    has_gpu: bool

    @property
    def cannot_share(self) -> str:
        """Empty, or why CPU ranks cannot tell each other by memory what they have written there."""
        return why_no_flags(self.system, self.processor)


def this_machine() -> Machine:
    has_gpu = any((Path("/dev") / name).exists() for name in GPU_FILES)
    return Machine(platform.system(), platform.machine(), has_gpu)


def settle_backend(
    parallel: ParallelConfig, *, executor: str, device: str, machine: Machine, environment: Mapping[str, str]
) -> tuple[str, str]:
    """The backend that will run, and why; no reason where it was asked for. ConfigError if it cannot run here.

    Launchers that see different machines must come to the same name: where ranks are started apart, nothing of this
    machine counts.
    """
    asked = parallel.all2all_backend
    if asked == SAME_MACHINE and machine.cannot_share:
        raise ConfigError(f"--all2all-backend {asked} cannot run here: {machine.cannot_share}; choose {AUTO}")
    if asked != AUTO:
        return asked, ""
    if parallel.topology.ep == 1:
        return ANYWHERE, "one rank has nobody to exchange rows with"
    reason = _apart(parallel, executor, environment) or _not_on_cpus(device, machine) or machine.cannot_share
    if reason:
        return ANYWHERE, reason
    return SAME_MACHINE, f"all {parallel.topology.world_size} ranks are on the CPUs of this machine"


def _apart(parallel: ParallelConfig, executor: str, environment: Mapping[str, str]) -> str:
    """Empty, or why ranks may be on other machines too."""
    if parallel.is_apart:
        return "ranks are started apart, perhaps on several machines"
    if executor == EXTERNAL_LAUNCHER:
        together = environment.get("LOCAL_WORLD_SIZE", "") == environment.get("WORLD_SIZE", "-")
        return "" if together else "whoever started the ranks may have done so on several machines"
    if parallel.data_parallel_backend == "ray":
        return "Ray may have put engines on several machines"
    if executor not in ("uni", "mp"):
        return f"the executor {executor} may have ranks on several machines"
    return ""


def _not_on_cpus(device: str, machine: Machine) -> str:
    if device == "cuda" or (device == AUTO and machine.has_gpu):
        return "ranks may compute on GPUs"
    return ""
