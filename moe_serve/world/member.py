"""What a process is told when it is started: which member of which world it is. Everything else it asks for there.

It travels in one environment variable (not on the command line, where everybody could read the token), so that a
launcher on this machine, a pod or a Ray actor can start a member alike.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from moe_serve.base.config import Config
from moe_serve.base.interpreter import child_environment
from moe_serve.base.messages import UNREADABLE
from moe_serve.base.site import Site

ENVIRONMENT = "MOE_SERVE_MEMBER"
METRICS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Where prometheus_client keeps the counts of processes that are scraped as one; read when it is imported."""


class SharedByServers(msgspec.Struct, frozen=True, kw_only=True):
    """What one API server, number `place` of `places`, has together with the others of its launcher.

    Descriptors that it inherits: the socket at the HTTP port, not `listening` yet, and the memory of the `board`
    (engine/board.py).
    """

    place: int
    places: int
    listening: int
    board: int


class MemberSpec(msgspec.Struct, frozen=True, kw_only=True):
    """`host` and `port` of the coordinator; `connect_seconds` to keep trying it; `config` is Config.to_json().
    Only an API server's has keys, and what is `shared`: without that it opens a port of its own.

    `essential`, `generation` and, for a front-end, `serves` as in Hello.
    """

    host: str
    port: int
    token: str
    config: str
    dp: int = -1
    site: Site = Site()
    essential: bool = True
    serves: list[int] | None = None
    generation: int = 0
    connect_seconds: float = 5.0
    shared: SharedByServers | None = None

    def to_environment(self) -> dict[str, str]:
        """Environment for the child: this one's without keys, the spec and the share of the cores."""
        inherited = {name: value for name, value in child_environment().items() if name.upper() != METRICS_FOLDER}
        return {
            **inherited,
            ENVIRONMENT: msgspec.json.encode(self).decode(),
            **thread_environment(self.site.threads),
            **(heap_environment() if self.dp < 0 else {}),
        }

    @classmethod
    def from_environment(cls) -> MemberSpec:
        return cls.from_json(os.environ[ENVIRONMENT])

    @classmethod
    def from_json(cls, told: str | bytes) -> MemberSpec:
        return msgspec.json.decode(told, type=cls)

    def load_config(self) -> Config:
        return Config.model_validate_json(self.config)


def started(matches: Callable[[MemberSpec], bool]) -> list[int]:
    """Process ids of this machine, but for this one, that were told such a MemberSpec.

    Told by the environment, which children of a member inherit: whatever a number was reused for is left alone.
    """
    return [
        int(folder.name)
        for folder in Path("/proc").glob("[0-9]*")
        if int(folder.name) != os.getpid() and (spec := _member_spec(folder)) is not None and matches(spec)
    ]


def end_all(pids: Iterable[int]) -> None:
    """SIGKILL; whoever is gone already is fine."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _member_spec(folder: Path) -> MemberSpec | None:
    """The MemberSpec in the environment of a process, given by its folder in /proc; None if there is none."""
    try:
        environment = (folder / "environ").read_bytes()
    except OSError:  # gone meanwhile, or somebody else's
        return None
    start = f"{ENVIRONMENT}=".encode()
    told = next((entry for entry in environment.split(b"\0") if entry.startswith(start)), None)
    try:
        return None if told is None else MemberSpec.from_json(told.removeprefix(start))
    except UNREADABLE:  # of another version of this package, or somebody else's
        return None


def thread_environment(threads: int) -> dict[str, str]:
    """Variables that keep a process to its share of the cores."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        **spin_environment(),
    }


def spin_environment() -> dict[str, str]:
    """Idle threads spin for a moment, then sleep, unless the operator says otherwise. Read when torch is loaded.

    On two cores a small model's step took 2.5 times as long when they slept at once; when they spun on, and anything
    else wanted the cores, it took up to twenty times as long. A thousand turns cost neither.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return {}
    return {"GOMP_SPINCOUNT": "1000"}


def heap_environment() -> dict[str, str]:
    """For who takes in large bodies: glibc gives large blocks back at once, unless the operator says otherwise.

    Left to itself it keeps blocks of up to 32 MiB in the heaps of all threads: sixty bodies of 16 MiB left 126 MiB in
    an API server that began with 42, and more with each hour; so they leave 61.
    """
    settings = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_ARENA_MAX": "2"}
    return {name: value for name, value in settings.items() if name not in os.environ}


def threads_per_rank(ranks_here: int) -> int:
    """A rank's share of the cores this process may use, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)
