"""One JSON file per measurement: when, where, which commit, which options, which numbers. And its table for docs/.

Files lie in bench/results/MACHINE/BENCHMARK-LABEL.json; measuring again under the same label replaces the file.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PERCENTILES = (50, 90, 99)
VERSIONS = ("torch", "transformers", "numpy", "uvicorn", "pyzmq")


@dataclass(frozen=True, slots=True)
class Report:
    """`config` what was asked; `numbers` what came out, with the unit in each name."""

    benchmark: str
    label: str
    config: Mapping[str, object]
    numbers: Mapping[str, object]
    machine: Mapping[str, object] = field(default_factory=lambda: describe_machine())
    commit: str = field(default_factory=lambda: current_commit())
    time: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))

    def write(self, folder: Path | None = None) -> Path:
        """The file written, in `folder` or in the results folder of this machine."""
        folder = folder or RESULTS / str(self.machine["name"])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.benchmark}-{self.label}.json"
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        return path


def read_reports(folder: Path = RESULTS) -> list[Report]:
    """All reports below a folder, in order of their paths."""
    return [Report(**json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.rglob("*.json"))]


def describe_machine() -> dict[str, object]:
    """This machine's name (made of its processor and the cores we may use), and what a reader wants to know of it."""
    cores = len(os.sched_getaffinity(0))
    processor = _processor()
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", f"{processor} {cores} cores".lower()).strip("-"),
        "processor": processor,
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in VERSIONS if (found := _version(name))},
    }


def current_commit() -> str:
    """The commit of the working tree, with a plus sign where files differ from it; "unknown" outside of git."""
    head, changed = (_git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--untracked-files=no"))
    return "unknown" if head is None else head + ("+" if changed else "")


def percentiles(values: Sequence[float], scale: float = 1.0) -> dict[str, float | None]:
    """{"p50": ..., "p90": ..., "p99": ...} of values times `scale`, linear between neighbours; None without values."""
    if not values:
        return dict.fromkeys(f"p{p}" for p in PERCENTILES)
    ordered = sorted(values)
    return {f"p{p}": round(_percentile(ordered, p / 100) * scale, 3) for p in PERCENTILES}


def spread(values: Sequence[float], digits: int = 1) -> dict[str, object]:
    """The median of repetitions beside all of them."""
    return {"median": round(statistics.median(values), digits), "all": [round(value, digits) for value in values]}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, one line per row."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def _percentile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
