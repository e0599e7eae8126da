"""How much memory a process here may still take, by the machine and by the control groups around it. Linux only."""

from __future__ import annotations

from pathlib import Path


def available_memory(root: Path = Path("/")) -> int:
    """Bytes a process here may still take: MemAvailable, or less where a control group says so."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    fields = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines) if rest}
    available = int(fields.get("MemAvailable", fields["MemFree"])) * 1024
    return max(0, min([available, *_cgroup_rooms(root)]))


def _cgroup_rooms(root: Path) -> list[int]:
    """Bytes left in each memory control group that holds this process (version 1 and 2)."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in memberships:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            names = ("memory.max", "memory.current", "inactive_file")
            top = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / "sys/fs/cgroup/memory"
        else:
            continue
        here = Path(path.lstrip("/"))
        # In a container the path may be the host's, which is not mounted: then only the top is there.
        for folder in (here, *here.parents):
            room = _room(top / folder, *names)
            if room is not None:
                rooms.append(room)
    return rooms


def _room(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    """Limit less usage, page cache that can be dropped not counted; None where there is no limit."""
    try:
        limit = int((folder / limit_name).read_text())
        usage = int((folder / usage_name).read_text())
        stat = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return None
    cache = next((int(line.split()[1]) for line in stat if line.startswith(cache_name + " ")), 0)
    return limit - usage + cache
