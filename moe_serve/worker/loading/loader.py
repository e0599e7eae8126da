"""Fills a rank's part of the model: from safetensors by the architecture's weight rules, or with agreed random numbers.

A rank reads only what it holds, but accounts for every tensor of the checkpoint: a missing, unexpected or misshapen
one is an error that names it.
"""

from __future__ import annotations

import hashlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from moe_serve.base.errors import CheckpointError
from moe_serve.model.archs.base import HEAD, WeightRule, find_spec
from moe_serve.model.decoder import Decoder
from moe_serve.model.partition import Partition
from moe_serve.worker.loading.checkpoint import Checkpoint, name_some

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadingReport:
    """Bytes this rank read, bytes the checkpoint has, seconds by phase."""

    bytes_read: int
    bytes_total: int
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint tensor's whole shape, and the part of it that fills `target` (None: another rank's)."""

    name: str
    shape: tuple[int, ...]
    index: tuple[range, ...]
    target: Tensor | None


@dataclass(slots=True)
class Inventory:
    """Which checkpoint tensor fills what, and what is wrong with the set of names."""

    sources: list[Source] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def load_weights(
    model: Decoder, folder: Path | str, *, load_format: str = "auto", show_progress: bool = False
) -> LoadingReport:
    """Fill the model's parameters. `show_progress` on one rank: a bar on a terminal, else a line in the log."""
    started = time.perf_counter()
    if load_format == "dummy":
        _fill_randomly(model)
        model.finish_loading()
        return LoadingReport(0, 0, {"random weights": time.perf_counter() - started})
    with Checkpoint(folder) as checkpoint:
        sources = _inventory(model, checkpoint)
        opened = time.perf_counter()
        held = [source for source in sources if source.target is not None]
        total = sum(checkpoint.num_bytes(source.name, source.index) for source in held)
        with byte_progress("Loading weights", total, show=show_progress) as report_done:
            for source in held:
                _fill(source, checkpoint)
                report_done(checkpoint.bytes_read)
        model.finish_loading()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        seconds = {"open": opened - started, "read": time.perf_counter() - opened}
        report = LoadingReport(checkpoint.bytes_read, checkpoint.bytes_total, seconds)
    if show_progress:
        logger.info(
            "read %.1f of %.1f MiB of weights in %.1f s",
            report.bytes_read / 2**20,
            report.bytes_total / 2**20,
            sum(seconds.values()),
        )
    return report


def _inventory(model: Decoder, checkpoint: Checkpoint) -> list[Source]:
    """Match rules with names; CheckpointError if any name or shape does not fit."""
    spec, partition, targets = find_spec(model.config), model.partition, model.targets()
    found = Inventory()
    for rule in spec.weights:
        for layer, expert in rule.places(model.config):
            target = targets.get(rule.parameter.format(layer=layer, expert=expert))
            source = _source(rule, layer, expert, partition, checkpoint, target)
            if source is None:
                found.missing.append(rule.names[0].format(layer=layer, expert=expert))
            else:
                found.sources.append(source)
    used = {source.name for source in found.sources}
    if model.config.tie_word_embeddings:
        used.add(HEAD)
    used |= checkpoint.unnamed  # what the index does not name is taken where it is needed, and else left
    found.unexpected = [name for name in checkpoint.tensors if name not in used and not name.endswith(spec.ignored)]
    _check_names(model, checkpoint, found)
    for source in found.sources:
        _check_shape(source, checkpoint)
    return found.sources


def _source(
    rule: WeightRule,
    layer: int | None,
    expert: int | None,
    partition: Partition,
    checkpoint: Checkpoint,
    target: Tensor | None,
) -> Source | None:
    """The tensor that fills a parameter: under one of its names, or inside one that stacks all experts."""
    shape = tuple(partition.size(axis) for axis in rule.axes)
    index = tuple(partition.held(axis) for axis in rule.axes)
    for pattern in rule.names:
        name = pattern.format(layer=layer, expert=expert)
        if name in checkpoint.tensors:
            return Source(name, shape, index, target)
    for stacked in rule.stacked:
        name = stacked.name.format(layer=layer)
        if name in checkpoint.tensors and expert is not None:
            first = stacked.part * shape[0]
            rows = range(first + index[0].start, first + index[0].stop)
            whole = (partition.config.num_experts, stacked.parts * shape[0], *shape[1:])
            return Source(name, whole, (range(expert, expert + 1), rows, *index[1:]), target)
    return None


def _check_names(model: Decoder, checkpoint: Checkpoint, found: Inventory) -> None:
    problems = []
    if found.missing:
        problems.append(f"{len(found.missing)} tensors are missing: {name_some(found.missing)}")
    if found.missing and checkpoint.absent:
        problems.append(f"the index names some that no file holds: {name_some(checkpoint.absent)}")
    if found.unexpected:
        problems.append(f"{len(found.unexpected)} tensors are unexpected: {name_some(found.unexpected)}")
    if problems:
        raise CheckpointError(
            f"the weights in {checkpoint.folder} do not fit {model.config.architecture} as its config.json "
            f"describes it; {'; '.join(problems)}"
        )


def _check_shape(source: Source, checkpoint: Checkpoint) -> None:
    stored = checkpoint.tensors[source.name]
    if stored.shape != source.shape:
        raise CheckpointError(
            f"{stored.file}: tensor {source.name} has shape {list(stored.shape)}, but config.json asks for "
            f"{list(source.shape)}"
        )


def _fill(source: Source, checkpoint: Checkpoint) -> None:
    if source.target is not None:
        source.target.copy_(checkpoint.read(source.name, source.index).view(source.target.shape))


@contextmanager
def byte_progress(title: str, total: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """A function that is told how many bytes are done; a bar on a terminal."""
    if not show or not sys.stderr.isatty():
        yield lambda done: None
        return
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("weights", total=total)
        yield lambda done: bar.update(task, completed=done)


def _fill_randomly(model: Decoder) -> None:
    """Each weight from a seed of its own name, whole and then cut, so that all ranks make parts of one model."""
    partition, targets = model.partition, model.targets()
    for rule in find_spec(model.config).weights:
        shape = tuple(partition.size(axis) for axis in rule.axes)
        cut = tuple(slice(part.start, part.stop) for part in map(partition.held, rule.axes))
        for layer, expert in rule.places(model.config):
            name = rule.parameter.format(layer=layer, expert=expert)
            if name in targets:
                targets[name].copy_(random_weight(name, shape, _generator(name))[cut].view(targets[name].shape))


def _generator(name: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
    return torch.Generator().manual_seed(seed)


def random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Norms near one, biases near zero, the rest so that every part matters and the logits are well spread."""
    numbers = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.1 * numbers
    if len(shape) == 1:
        return 0.1 * numbers
    if "embed" in name:
        return numbers
    return numbers * ((3.0 if "head" in name else 1.5) / math.sqrt(shape[-1]))
