"""Which files of a model folder hold its weights, and the type they were saved in, told without torch."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from moe_serve.base.errors import CheckpointError
from moe_serve.base.fields import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_INDEX = 128 * 2**20  # a million tensors
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def weight_map(path: Path) -> dict[str, str]:
    """An index: tensor -> file, all of them in the index's folder or below. Raises CheckpointError."""
    where = _index(path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{path} must hold an object weight_map from tensor names to file names")
    for file in sorted(set(where.values())):
        inside = not PurePosixPath(file).is_absolute() and ".." not in PurePosixPath(file).parts
        if not inside or not (path.parent / file).is_file():
            raise CheckpointError(f"{path} names the file {file}, which is not in {path.parent}")
    return where


def stored_dtype(folder: Path) -> str | None:
    """The type that transformers takes for a checkpoint whose config.json names none.

    The index's `dtype`, else that of the first floating tensor of the first file, by name. None where it cannot be
    told: without weights, or with a broken file, which whoever reads it will name.
    """
    try:
        if (folder / SINGLE).is_file():
            return _first_dtype(folder / SINGLE)
        metadata = _index(folder / INDEX).get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("dtype"), str):
            return str(metadata["dtype"]).removeprefix("torch.")
        files = weight_map(folder / INDEX).values()
        return _first_dtype(folder / min(files)) if files else None
    except (CheckpointError, OSError, ValueError, RecursionError):
        return None


def _index(path: Path) -> dict[str, object]:
    return read_object(path, max_bytes=LARGEST_INDEX)


def _first_dtype(path: Path) -> str | None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if length <= LARGEST_HEADER else None
    if not isinstance(header, dict):
        return None
    tensors = [value for name, value in sorted(header.items()) if name != "__metadata__" and isinstance(value, dict)]
    found = [_DTYPES[tensor["dtype"]] for tensor in tensors if tensor.get("dtype") in _DTYPES]
    return found[0] if found else None
