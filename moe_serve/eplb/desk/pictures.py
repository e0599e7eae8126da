"""Pictures of balance over time, of moves and of who computes what. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_serve.base.errors import MissingExtra
from moe_serve.base.registry import import_target
from moe_serve.eplb.desk.replay import Gain, Outcome
from moe_serve.eplb.placement import Placement
from moe_serve.eplb.policies.base import Floats
from moe_serve.eplb.search.scores import slot_loads

FORMATS = ("png", "svg")
COLOURS = {"sticky": "#0b7285", "deepseek": "#e8590c", "static": "#868e96", "shuffle": "#ae3ec9"}


def new_figure(**options: Any) -> Any:
    """A matplotlib figure; MissingExtra where there is no matplotlib."""
    try:
        figure: Any = import_target("matplotlib.figure:Figure", "picture format", "png")
    except MissingExtra as error:
        raise MissingExtra(
            "pictures need matplotlib, which is not installed: pip install 'moe-serve[plot]', or leave --pictures out"
        ) from error
    return figure(layout="constrained", **options)


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write the figure as PNG and SVG; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in FORMATS]
    for path in paths:
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def draw_replay(outcomes: Sequence[Outcome], title: str) -> Any:
    """Balancedness of each window, rearrangements marked by dots as large as what they move, and the moved share."""
    redundancies = sorted({outcome.num_redundant for outcome in outcomes})
    figure = new_figure(figsize=(4.2 * len(redundancies) + 1, 6))
    axes = figure.subplots(2, len(redundancies), squeeze=False, sharex=True, sharey="row")
    for column, num_redundant in enumerate(redundancies):
        above, below = axes[:, column]
        for outcome in outcomes:
            if outcome.num_redundant != num_redundant:
                continue
            colour = COLOURS.get(outcome.policy)
            window = np.arange(1, len(outcome.balancedness) + 1)
            above.plot(window, outcome.balancedness, color=colour, label=outcome.policy)
            above.plot(window, outcome.balancedness_uneven, color=colour, linestyle=":", label="_uneven")
            above.scatter(window, outcome.balancedness, s=80 * np.array(outcome.moved_share), color=colour)
            below.plot(window, np.array(outcome.moved_share) * 100, color=colour, label=outcome.policy)
        above.set_title(f"{num_redundant} redundant experts")
        below.set_xlabel("window")
        above.grid(alpha=0.3)
        below.grid(alpha=0.3)
    axes[0, 0].set_ylabel("balancedness (dotted: uneven shares)")
    axes[1, 0].set_ylabel("slots moved, %")
    axes[0, 0].legend(loc="lower right", fontsize="small")
    figure.suptitle(title)
    return figure


def draw_redundancy(gains: Sequence[Gain], chosen: int) -> Any:
    """Step time saved and balancedness over the number of redundant experts."""
    figure = new_figure(figsize=(7, 4))
    left = figure.subplots()
    right = left.twinx()
    counts = [gain.num_redundant for gain in gains]
    left.plot(counts, [100 * gain.saved_share for gain in gains], color="#0b7285", marker="o")
    right.plot(counts, [gain.balancedness for gain in gains], color="#868e96", marker=".", label="even")
    right.plot(counts, [gain.balancedness_uneven for gain in gains], color="#868e96", linestyle=":", label="uneven")
    left.axvline(chosen, color="#e8590c", linestyle="--", label=f"pays up to {chosen}")
    left.set_xlabel("redundant experts")
    left.set_ylabel("modelled step time saved, %")
    right.set_ylabel("balancedness")
    left.legend(loc="lower right")
    right.legend(loc="center right", title="balancedness")
    left.grid(alpha=0.3)
    return figure


def draw_heat(load_LE: Floats, before: Placement, after: Placement, layer: int) -> Any:
    """Tokens of each expert on each rank of one layer, before and after."""
    figure = new_figure(figsize=(11, 5))
    axes = figure.subplots(1, 2, sharey=True)
    tables = [_expert_by_rank(load_LE, placement, layer) for placement in (before, after)]
    # Square roots, so that the many light experts can be seen beside the few heavy ones.
    top = np.sqrt(max(table.max() for table in tables))
    image = None
    for axis, table, title in zip(axes, tables, ("before", "after"), strict=True):
        image = axis.imshow(np.sqrt(table), aspect="auto", interpolation="nearest", cmap="magma", vmin=0, vmax=top)
        loads = table.sum(axis=1)
        axis.set_title(f"{title}: mean / max rank load {loads.mean() / loads.max():.3f}")
        axis.set_xlabel("expert, heaviest first")
    axes[0].set_ylabel("rank")
    figure.colorbar(image, ax=axes, label="square root of tokens")
    figure.suptitle(f"layer {layer}")
    return figure


def _expert_by_rank(load_LE: Floats, placement: Placement, layer: int) -> Floats:
    table = np.zeros((placement.num_ranks, placement.num_logical))
    tokens_P = slot_loads(load_LE, placement)[layer]
    np.add.at(table, (placement.rank_of_slot(), placement.physical_to_logical_LP[layer]), tokens_P)
    ordered: Floats = table[:, np.argsort(-load_LE[layer], kind="stable")]
    return ordered
