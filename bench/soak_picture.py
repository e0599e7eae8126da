"""A soak as a picture: memory, descriptors, threads and answers over time, a line for each process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.command import save_figure
from bench.report import Report

PANELS = {"uss_mib": "Memory of its own (USS), MiB", "descriptors": "Open descriptors", "threads": "Threads"}


def draw(report: Report, path: Path) -> None:
    """Beside the JSON file as .png and .svg; the warm-up is shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timeline: Any = report.numbers["timeline"]
    counts: Any = report.numbers["counts"]
    figure, panels = pyplot.subplots(4, 1, figsize=(10, 11), sharex=True, layout="constrained")
    for panel, (measure, title) in zip(panels, PANELS.items(), strict=False):
        for name, measures in timeline["processes"].items():
            values = measures[measure]
            panel.plot([at / 60 for at in timeline["seconds"][: len(values)]], values, label=name, linewidth=1.2)
        panel.set(title=title, ylim=(0, None))
    answers = timeline["answers_per_second"]
    panels[-1].plot([at / 60 for at, _ in answers], [rate for _, rate in answers], color="black", linewidth=1.2)
    panels[-1].set(title="Answers per second", xlabel="minutes", ylim=(0, None))
    for panel in panels:
        panel.axvspan(0, float(str(report.numbers["warm_up_seconds"])) / 60, color="tab:gray", alpha=0.15, linewidth=0)
        panel.grid(visible=True, alpha=0.25)
    panels[0].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    said = ("answers", "rearrangements", "disconnects", "hostile bodies", "knocks")
    figure.suptitle(f"dp={report.config['dp']}: " + ", ".join(f"{counts[name]:,} {name}" for name in said))
    save_figure(figure, path)
    pyplot.close(figure)
