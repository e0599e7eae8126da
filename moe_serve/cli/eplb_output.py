"""What `moe-serve eplb` prints and writes: news to standard error, results as tables or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_serve.base.errors import ConfigError
from moe_serve.eplb.desk.replay import Gain, Outcome

console = Console(stderr=True)


def print_facts(facts: Mapping[str, object], *, as_json: bool) -> None:
    """Names and values, as one JSON object or one per line."""
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name:24}{value:.6g}" if isinstance(value, float) else f"{name:24}{value}")


def report_pictures(paths: Sequence[Path]) -> None:
    for path in paths:
        console.print(f"wrote {path}", soft_wrap=True)


def write_or_print(document: dict[str, object], table: Table, *, out: Path | None, as_json: bool) -> None:
    """The document to the file `out`; to standard output it or, for people, the table."""
    if out is not None:
        try:
            out.write_text(json.dumps(document, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error
        console.print(f"wrote {out}", soft_wrap=True)
    if as_json:
        print(json.dumps(document))
    else:
        Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).print(table)


def replay_table(outcomes: Sequence[Outcome], start: float) -> Table:
    table = Table(title=f"Linear placement without redundancy: balancedness {start:.3f}")
    for heading in (
        "redundant",
        "policy",
        "balanced",
        "uneven",
        "step ms",
        "moved %",
        "MiB",
        "crossing",
        "solve ms",
    ):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for outcome in outcomes:
        means = {name: value for name, value in outcome.summary().items() if isinstance(value, float | int)}
        table.add_row(
            str(outcome.num_redundant),
            outcome.policy,
            f"{means['balancedness']:.4f}",
            f"{means['balancedness_uneven']:.4f}",
            f"{means['step_seconds'] * 1e3:.3f}",
            f"{means['moved_share'] * 100:.1f}",
            f"{means['moved_bytes'] / 2**20:.0f}",
            f"{means['cross_node_moves']:.0f}",
            f"{means['solve_seconds'] * 1e3:.1f}",
        )
    return table


def redundancy_table(gains: Sequence[Gain], chosen: int) -> Table:
    table = Table(title=f"Redundant experts that pay: {chosen}")
    for heading in ("redundant", "balanced", "uneven", "step ms", "saved %", "% per expert", "MiB per rank"):
        table.add_column(heading, justify="right")
    for gain in gains:
        table.add_row(
            str(gain.num_redundant),
            f"{gain.balancedness:.4f}",
            f"{gain.balancedness_uneven:.4f}",
            f"{gain.step_seconds * 1e3:.3f}",
            f"{gain.saved_share * 100:.2f}",
            f"{gain.marginal_share * 100:.3f}",
            f"{gain.bytes_per_rank / 2**20:.1f}",
        )
    return table
