"""What the cgroup of this process may use, version 1 or 2: the tightest limit on the way up counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 62
"""Version 1 says "no limit" with a number near 2**63."""


def cpu_limit(mount: Path = MOUNT, told: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs' worth of time that may be used; None for as much as there is."""
    limits = []
    for folder in _folders(mount, told, "cpu"):
        quota, period = _pair(folder / "cpu.max")
        if quota is None:
            quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is not None and period and quota > 0:
            limits.append(quota / period)
    return min(limits, default=None)


def memory_left(mount: Path = MOUNT, told: Path = Path("/proc/self/cgroup")) -> tuple[int, int] | None:
    """Limit and what is left of it, in bytes, where the least is left; None without a limit."""
    rooms = []
    for folder in _folders(mount, told, "memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and limit < UNLIMITED:
                rooms.append((limit, max(0, limit - (used or 0))))
    return min(rooms, key=lambda room: room[1], default=None)


def _folders(mount: Path, told: Path, controller: str) -> Iterator[Path]:
    """Of this process's group and those above it. Inside a container the own group may be the mount itself."""
    for line in _lines(told):
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" or controller in names.split(","):
            root = mount if number == "0" else mount / controller
            parts = Path(path.strip().lstrip("/")).parts
            for depth in range(len(parts), -1, -1):
                yield root.joinpath(*parts[:depth])


def _lines(path: Path) -> Iterable[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _pair(path: Path) -> tuple[int | None, int | None]:
    """`max 100000` or `50000 100000`."""
    words = " ".join(_lines(path)).split()
    return (int(words[0]), int(words[1])) if len(words) == 2 and words[0].isdigit() else (None, None)


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.lstrip("-").isdigit() else None
