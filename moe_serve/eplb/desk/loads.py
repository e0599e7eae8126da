"""Recorded expert loads: reading and writing `logical_count` [steps, layers, experts].

Our own format is safetensors with metadata; .npy, .npz ([layers, experts] or with steps in front) and the .pt files
that SGLang's recorder writes are read too.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_serve.base.errors import ConfigError
from moe_serve.base.registry import import_target
from moe_serve.eplb.policies.base import Floats, check_load

KEY = "logical_count"


@dataclass(frozen=True, slots=True)
class Trace:
    """`count_SLE` (steps, layers, experts): tokens that chose each expert in each step; text about it beside."""

    count_SLE: npt.NDArray[np.generic]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> Floats:
        """float64 (L, E): the sum over all steps; ConfigError if it cannot be balanced."""
        total: npt.NDArray[np.generic] = self.count_SLE.sum(axis=0, dtype=np.float64)
        return check_load(total)

    def windows(self, steps: int) -> list[Floats]:
        """The trace cut into windows of float64 (steps, L, E); what does not fill a window is left out."""
        count = len(self.count_SLE) // steps
        return [self.count_SLE[at * steps : (at + 1) * steps].astype(np.float64) for at in range(count)]


def read_trace(path: Path) -> Trace:
    """Read a recorded load; ConfigError says what is wrong with the file."""
    readers: dict[str, Callable[[Path], Trace]] = {
        ".safetensors": _read_safetensors,
        ".npy": _read_npy,
        ".npz": _read_npz,
        ".pt": _read_pt,
    }
    if path.suffix not in readers:
        raise ConfigError(f"load file {path} has an unknown format; known are: {', '.join(readers)}")
    if not path.is_file():
        raise ConfigError(f"load file {path} does not exist" if not path.exists() else f"load file {path} is no file")
    trace = readers[path.suffix](path)
    return _checked(trace, path)


def write_trace(path: Path, trace: Trace) -> None:
    """Write our own format; ConfigError if the file cannot be written."""
    counts = np.ascontiguousarray(trace.count_SLE, dtype=np.int64)
    try:
        save_file({KEY: counts}, path, metadata=dict(trace.metadata))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"load file {path} cannot be written: {error}") from error


def _checked(trace: Trace, path: Path) -> Trace:
    counts = trace.count_SLE
    if counts.dtype.kind not in "iuf":
        raise ConfigError(f"load file {path}: {KEY} must hold numbers, not {counts.dtype}")
    if counts.ndim not in (2, 3) or not counts.size:
        raise ConfigError(
            f"load file {path}: {KEY} must have the shape [steps, layers, experts] or [layers, experts], "
            f"not {list(counts.shape)}"
        )
    if not np.isfinite(counts).all():
        raise ConfigError(f"load file {path}: {KEY} holds NaN or infinity; loads must be finite and not negative")
    if counts.min() < 0:
        raise ConfigError(f"load file {path}: {KEY} holds {counts.min():g}; loads must not be negative")
    if not counts.any():
        raise ConfigError(f"load file {path}: {KEY} is zero everywhere, so there is nothing to balance")
    return Trace(counts if counts.ndim == 3 else counts[None], trace.metadata)


def _read_safetensors(path: Path) -> Trace:
    try:
        with safe_open(path, framework="numpy") as file:
            if KEY not in file.keys():  # noqa: SIM118 (not a mapping)
                raise ConfigError(f"load file {path} lacks the tensor {KEY}; it holds {_names(file.keys())}")
            return Trace(file.get_tensor(KEY), file.metadata() or {})
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"load file {path} is not a readable safetensors file: {error}") from error


def _read_npy(path: Path) -> Trace:
    try:
        return Trace(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"load file {path} is not a readable .npy file: {error}") from error


def _read_npz(path: Path) -> Trace:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays)
            if KEY not in names and len(names) != 1:
                raise ConfigError(f"load file {path} lacks the array {KEY}; it holds {_names(names)}")
            return Trace(arrays[KEY if KEY in names else names[0]])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"load file {path} is not a readable .npz file: {error}") from error


def _read_pt(path: Path) -> Trace:
    # Reached by name: planning from the other formats must not need torch.
    load: Any = import_target("torch:load", "load file format", ".pt")
    try:
        found: Any = load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        brief = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"load file {path} is not a .pt file of plain tensors: {brief}") from error
    if not isinstance(found, Mapping) or KEY not in found:
        held = _names(found) if isinstance(found, Mapping) else type(found).__name__
        raise ConfigError(f"load file {path} lacks the key {KEY}; it holds {held}")
    if not hasattr(found[KEY], "numpy"):
        raise ConfigError(f"load file {path}: {KEY} must be a tensor, not {type(found[KEY]).__name__}")
    return Trace(found[KEY].numpy())


def _names(names: Any) -> str:
    return ", ".join(str(name) for name in names) or "nothing"
