"""Placements as JSON: what `moe-serve eplb plan` writes, GET /eplb shows and --expert-placement-file reads.

{"num_ranks": R, "num_nodes": N, "physical_to_logical": [[expert of slot 0, ...], one row per layer],
 "rank_of_slot": [rank of slot 0, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moe_serve.base.errors import ConfigError
from moe_serve.eplb.placement import Ints, Placement

KEYS = ("num_ranks", "num_nodes", "physical_to_logical", "rank_of_slot")


def placement_to_document(placement: Placement, num_nodes: int = 1) -> dict[str, object]:
    """The placement as plain JSON values."""
    return {
        "num_ranks": placement.num_ranks,
        "num_nodes": num_nodes,
        "physical_to_logical": placement.physical_to_logical_LP.tolist(),
        "rank_of_slot": placement.rank_of_slot().tolist(),
    }


def write_placement(path: Path, placement: Placement, num_nodes: int = 1) -> None:
    """Write the document; ConfigError if the file cannot be written."""
    try:
        path.write_text(json.dumps(placement_to_document(placement, num_nodes)) + "\n")
    except OSError as error:
        raise ConfigError(f"placement file {path} cannot be written: {error.strerror}") from error


def read_placement(
    path: Path,
    *,
    num_layers: int | None = None,
    num_experts: int | None = None,
    num_ranks: int | None = None,
    num_redundant: int | None = None,
) -> Placement:
    """Read a placement file; ConfigError if it is broken or not of the given model and world (None: any)."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"placement file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"placement file {path} is not JSON: {error}") from error
    return placement_from_document(
        document,
        f"placement file {path}",
        num_layers=num_layers,
        num_experts=num_experts,
        num_ranks=num_ranks,
        num_redundant=num_redundant,
    )


def placement_from_document(
    document: object,
    name: str = "placement",
    *,
    num_layers: int | None = None,
    num_experts: int | None = None,
    num_ranks: int | None = None,
    num_redundant: int | None = None,
) -> Placement:
    """The placement in a document that came from outside; `name` begins every message.

    Slots may be listed in any order of ranks; they are sorted by rank. Raises ConfigError.
    """
    if not isinstance(document, Mapping):
        raise ConfigError(f"{name} must hold an object with {', '.join(KEYS)}, not {type(document).__name__}")
    missing = [key for key in KEYS if key not in document and key != "num_nodes"]
    if missing:
        raise ConfigError(f"{name} lacks {', '.join(missing)}; it must hold {', '.join(KEYS)}")
    ranks = _count(document["num_ranks"], f"{name}: num_ranks")
    _count(document.get("num_nodes", 1), f"{name}: num_nodes")
    table_LP = _integers(document["physical_to_logical"], 2, f"{name}: physical_to_logical")
    rank_P = _integers(document["rank_of_slot"], 1, f"{name}: rank_of_slot")
    _check_world(name, table_LP, rank_P, ranks, expected_ranks=num_ranks, expected_layers=num_layers)
    experts = int(table_LP.max(initial=-1)) + 1 if num_experts is None else num_experts
    if table_LP.min(initial=0) < 0 or table_LP.max(initial=0) >= experts:
        worst = int(table_LP.min() if table_LP.min() < 0 else table_LP.max())
        raise ConfigError(f"{name} holds expert {worst}, but this model's experts are 0 to {experts - 1}")
    order = np.argsort(rank_P, kind="stable")
    offsets = (0, *np.cumsum(np.bincount(rank_P, minlength=ranks)).tolist())
    placement = Placement(np.ascontiguousarray(table_LP[:, order]), offsets, experts)
    try:
        placement.check()
    except ValueError as error:
        raise ConfigError(f"{name}: {error}; every layer must hold each of experts 0 to {experts - 1}") from error
    if num_redundant is not None and placement.num_redundant != num_redundant:
        raise ConfigError(
            f"{name} has {placement.num_physical} slots for {experts} experts, {placement.num_redundant} redundant, "
            f"but num_redundant_experts is {num_redundant} (option --eplb-config.num-redundant-experts)"
        )
    return placement


def _check_world(
    name: str,
    table_LP: Ints,
    rank_P: Ints,
    ranks: int,
    *,
    expected_ranks: int | None,
    expected_layers: int | None,
) -> None:
    if expected_ranks is not None and ranks != expected_ranks:
        raise ConfigError(f"{name} is for {ranks} ranks, but this world spreads experts over {expected_ranks}")
    if expected_layers is not None and len(table_LP) != expected_layers:
        raise ConfigError(f"{name} has {len(table_LP)} layers, but this model has {expected_layers} with experts")
    if table_LP.shape[1] != len(rank_P):
        raise ConfigError(
            f"{name}: physical_to_logical has {table_LP.shape[1]} slots a layer, rank_of_slot has {len(rank_P)}"
        )
    if rank_P.min(initial=0) < 0 or rank_P.max(initial=0) >= ranks:
        worst = int(rank_P.min() if rank_P.min() < 0 else rank_P.max())
        raise ConfigError(f"{name}: rank_of_slot names rank {worst}, but the ranks are 0 to {ranks - 1}")


def _count(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
    return value


def _integers(value: object, dimensions: int, name: str) -> Ints:
    shape = {1: "a list of whole numbers", 2: "a list of equally long lists of whole numbers"}[dimensions]
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise ConfigError(f"{name} must be {shape}; its rows differ in length") from error
    if not isinstance(value, list) or array.ndim != dimensions or array.dtype.kind not in "iu" or not array.size:
        raise ConfigError(f"{name} must be {shape}, not {_brief(value)}")
    return array.astype(np.int64)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
