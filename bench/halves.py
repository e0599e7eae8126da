"""What steps in two halves (--enable-dbo) are worth over how slow the wire is: `python -m bench.halves`.

Two engines, once with and once without, serve the same new prompts by turns. Between rows and experts lies a made-up
wire (bench/slow_wire.py) on which a rank's rows go one behind the other; its seconds per row are chosen so that a step
without halves spends so many times as long waiting as it computes. Wire 0: none, so that only what halves cost is left.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.command import keep, parser_for, save_figure
from bench.offline import Generate, make_checkpoint, ours, random_prompts
from bench.report import Report, spread
from bench.slow_wire import FILE_VARIABLE, set_seconds_per_row
from moe_serve import LLM
from moe_serve.base.model_config import load_model_config

RANKS = 2
console = Console(stderr=True)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(options.model) if options.model else make_checkpoint(options, Path(folder))
        wire = Path(folder) / "wire"
        wire.write_bytes(bytes(8))
        os.environ[FILE_VARIABLE] = str(wire)
        report = measure(options, model, wire)
    show(report)
    keep(report, options.out, draw)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    parser.add_argument("--model", help="checkpoint folder; a random one of --preset and --arch if not given")
    parser.add_argument("--preset", default="small", choices=["tiny", "small"])
    parser.add_argument("--arch", default="qwen3_moe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-requests", type=int, default=8)
    parser.add_argument("--input-len", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--output-len", type=int, default=1, help="tokens of each answer; 1 for prompts alone")
    parser.add_argument("--wires", type=float, nargs="+", default=[0, 0.1, 0.25, 0.5, 1, 2, 4])
    parser.add_argument("--turns", type=int, default=7, help="for each wire, after one that does not count")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, folder: Path, wire: Path) -> Report:
    model = load_model_config(folder)
    asked: dict[str, Any] = {
        "dtype": "bfloat16",
        "data_parallel_size": RANKS,
        "enable_expert_parallel": True,
        "enable_prefix_caching": False,
        "worker_cls": "bench.slow_wire:OverSlowWire",
    }
    halved = {"enable_dbo": True, "dbo_decode_token_threshold": 2, "dbo_prefill_token_threshold": 2}

    def prompts() -> list[list[int]]:
        options.seed += 1
        return random_prompts(options.num_requests, options.input_len, model.vocab_size, options.seed)

    with ExitStack() as stack:
        whole, halves = (
            ours(stack.enter_context(LLM(folder, **asked, **more)), options.output_len) for more in ({}, halved)
        )
        plain = statistics.median(_seconds(whole, prompts()) for _ in range(options.turns))
        rows = len(model.moe_layers) * options.num_requests * (options.input_len + options.output_len - 1) / RANKS
        numbers = {}
        for times in options.wires:
            set_seconds_per_row(wire, times * plain / (2 * rows))
            numbers[f"wire {times:g}"] = _compare(whole, halves, prompts, options.turns, f"wire {times:g}")
    config = {
        "model": (options.model and Path(options.model).name) or f"{options.preset} {options.arch}",
        "num_requests": options.num_requests,
        "input_len": options.input_len,
        "output_len": options.output_len,
        "ranks": RANKS,
        "turns": options.turns,
    }
    kind = "prompts" if options.output_len == 1 else "decode"
    return Report("halves", options.label or f"{options.preset}-{kind}", config, numbers)


def _compare(
    whole: Generate, halves: Generate, prompts: Callable[[], list[list[int]]], turns: int, name: str
) -> dict[str, object]:
    pairs = []
    for _ in track(range(turns + 1), description=name, console=console):
        batch = prompts()
        pairs.append((_seconds(whole, batch), _seconds(halves, batch)))
    return {
        "seconds_whole": spread([each for each, _ in pairs[1:]], 3),
        "seconds_in_halves": spread([each for _, each in pairs[1:]], 3),
        "gain": spread([one / other for one, other in pairs[1:]], 3),
    }


def _seconds(generate: Generate, prompts: list[list[int]]) -> float:
    began = time.perf_counter()
    generate(prompts)
    return time.perf_counter() - began


def show(report: Report) -> None:
    table = Table("wire / computing", "whole s", "in halves s", "gain", "least", "most")
    for name, found in report.numbers.items():
        assert isinstance(found, dict)
        whole, halves, gain = (found[each] for each in ("seconds_whole", "seconds_in_halves", "gain"))
        least, most = min(gain["all"]), max(gain["all"])
        table.add_row(*map(str, (name.split()[1], whole["median"], halves["median"], gain["median"], least, most)))
    console.print(table)


def draw(report: Report, path: Path) -> None:
    """Gain over the wire, with all turns; what can be had at most if everything overlapped and halves cost nothing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers: Any = report.numbers
    wires = [float(name.split()[1]) for name in numbers]
    figure, panel = pyplot.subplots(figsize=(7, 4), layout="constrained")
    panel.plot(wires, [(1 + wire) / max(1, wire) for wire in wires], "--", color="tab:gray", label="at most")
    for wire, found in zip(wires, numbers.values(), strict=True):
        panel.plot([wire] * len(found["gain"]["all"]), found["gain"]["all"], ".", color="tab:blue", alpha=0.4)
    panel.plot(wires, [found["gain"]["median"] for found in numbers.values()], "o-", color="tab:blue", label="measured")
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set(
        title=f"Steps in halves, {report.config['model']}, {report.config['ranks']} ranks",
        xlabel="time on the wire, of the time that a step computes",
        ylabel="speed-up",
        xticks=wires,
    )
    panel.set_xscale("symlog", linthresh=0.1)
    panel.set_xticks(wires, [f"{wire:g}" for wire in wires])
    panel.minorticks_off()
    panel.legend(fontsize=8)
    panel.grid(visible=True, alpha=0.25)
    save_figure(figure, path)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
