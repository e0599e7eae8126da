"""What each process of a world takes over time (memory, descriptors, threads), and whether that grows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

from moe_serve.world.member import ENVIRONMENT

MEASURES = ("uss_mib", "pss_mib", "rss_mib", "descriptors", "threads")
"""Memory: its own pages (USS), with its share of common ones (PSS; changes when others start), all it sees (RSS)."""
MIB = 1 << 20
MAX_POINTS = 240
"""Points of a timeline in a report, and those that a slope is taken of."""
Sample = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Trend:
    """Of one measure of one process: medians of the first and the last third, and how much it grew between the ends.

    Growth is Theil-Sen's slope (the median of the slopes between all pairs of points) times the time observed, so that
    a peak that passes is no growth.
    """

    first: float
    last: float
    growth: float
    per_hour: float


def trend(times: Sequence[float], values: Sequence[float]) -> Trend:
    """Times in seconds; at least three points at different times."""
    at, of = np.asarray(thinned(times), dtype=float), np.asarray(thinned(values), dtype=float)
    later, earlier = np.triu_indices(len(at), 1)
    slope = float(np.median((of[later] - of[earlier]) / (at[later] - at[earlier])))
    third = max(1, len(of) // 3)
    return Trend(
        first=round(float(np.median(of[:third])), 2),
        last=round(float(np.median(of[-third:])), 2),
        growth=round(slope * float(at[-1] - at[0]), 3),
        per_hour=round(slope * 3600, 3),
    )


def thinned(values: Sequence[float]) -> list[float]:
    """At most MAX_POINTS of them, evenly."""
    step = max(1, -(-len(values) // MAX_POINTS))
    return list(values[::step])


@dataclass(slots=True)
class Footprints:
    """Samples of processes by their names; who has ended is in `gone` from then on."""

    processes: Mapping[str, psutil.Process]
    times: list[float] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    gone: dict[str, float] = field(default_factory=dict)

    def take(self, at: float) -> None:
        """One sample of each, at a time in seconds."""
        self.times.append(at)
        for name, process in self.processes.items():
            if name in self.gone:
                continue
            try:
                self.samples.setdefault(name, []).append(_sample(process))
            except psutil.Error:
                self.gone[name] = at

    def series(self, name: str, measure: str) -> tuple[list[float], list[float]]:
        """Times and values of one measure of one process."""
        values = [sample[measure] for sample in self.samples.get(name, ())]
        return self.times[: len(values)], values

    def trends(self, since: float) -> dict[str, dict[str, Trend]]:
        """Process -> measure -> how it went from `since` on; of processes with points enough."""
        found: dict[str, dict[str, Trend]] = {}
        for name in self.samples:
            times, _ = self.series(name, "threads")
            start = next((place for place, at in enumerate(times) if at >= since), len(times))
            if len(times) - start >= 3:
                found[name] = {
                    measure: trend(times[start:], self.series(name, measure)[1][start:]) for measure in MEASURES
                }
        return found


def named(processes: Sequence[psutil.Process]) -> dict[str, psutil.Process]:
    """Each process under what it is: launcher, api, engine 0, engine 1, solver, solver 2 ..."""
    found: dict[str, psutil.Process] = {}
    for process in sorted(processes, key=lambda each: each.pid):
        with contextlib.suppress(psutil.Error):
            name, number = _role(process), 2
            unique = name
            while unique in found:
                unique, number = f"{name} {number}", number + 1
            found[unique] = process
    return dict(sorted(found.items()))


def _role(process: psutil.Process) -> str:
    command = process.cmdline()
    module = command[command.index("-m") + 1] if "-m" in command else process.name()
    if module == "moe_serve":
        return "launcher"
    role = module.removeprefix("moe_serve.").removesuffix(".process").removesuffix("_process").removesuffix(".server")
    role = role.removeprefix("world.")
    dp = json.loads(process.environ().get(ENVIRONMENT, "{}")).get("dp", -1)
    return f"{role} {dp}" if role == "engine" else role


def _sample(process: psutil.Process) -> Sample:
    with process.oneshot():
        if process.status() == psutil.STATUS_ZOMBIE:
            raise psutil.NoSuchProcess(process.pid)
        memory = process.memory_full_info()
        return {
            "uss_mib": round(memory.uss / MIB, 2),
            "pss_mib": round(memory.pss / MIB, 2),
            "rss_mib": round(memory.rss / MIB, 2),
            "descriptors": process.num_fds(),
            "threads": process.num_threads(),
        }
