"""What the command of every benchmark has: options for its result, and one way to keep it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.report import ROOT, Report

PICTURES = (".png", ".svg")
console = Console(stderr=True)


def parser_for(
    description: str | None, *, label: str | None = None, epilog: str | None = None
) -> argparse.ArgumentParser:
    """A parser with --label and --out; `label` None where the benchmark makes one of its options."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=epilog
    )
    otherwise = "made of the options" if label is None else label
    parser.add_argument("--label", default=label, help=f"name of the result; {otherwise} if not given")
    parser.add_argument("--out", type=Path, help="folder of the result; bench/results/MACHINE if not given")
    return parser


def add_checkouts(parser: argparse.ArgumentParser) -> None:
    """The two that a benchmark compares."""
    parser.add_argument("--before", type=Path, required=True, help="root of the checkout to compare with")
    parser.add_argument("--after", type=Path, default=ROOT, help="root of the other one; this one if not given")


def import_path(checkout: Path) -> str:
    """PYTHONPATH of a child that is to run a checkout, its device code with it."""
    return os.pathsep.join(str(checkout.resolve() / part) for part in ("", "kernels"))


def keep(report: Report, folder: Path | None, draw: Callable[[Report, Path], None] | None = None) -> None:
    """Write the report, draw its pictures beside it, and say where they are."""
    path = report.write(folder)
    if draw is not None:
        draw(report, path)
    console.print(f"written to {path}{', .png and .svg' if draw is not None else ''}", soft_wrap=True)


def save_figure(figure: Any, path: Path) -> None:
    """A matplotlib figure beside `path`. SVG without a date: the same numbers must give the same file."""
    for ending in PICTURES:
        figure.savefig(path.with_suffix(ending), dpi=120, metadata={"Date": None} if ending == ".svg" else None)
