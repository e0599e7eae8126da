"""The tensors of a model folder: one safetensors file, or several with an index. Reads slices, counts their bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_serve.base.errors import CheckpointError
from moe_serve.base.fields import read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 128 * 2**20  # a million tensors
READABLE = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies and what it looks like there."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * READABLE.get(self.dtype, 1)


class Checkpoint:
    """Open until closed. `tensors` by name; `bytes_read` grows with every read()."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.bytes_read = 0
        self._files: dict[Path, Any] = {}
        self.tensors: dict[str, Stored] = {}
        single = self.folder / SINGLE
        if single.is_file():
            self._add_file(single)
        elif (self.folder / INDEX).is_file():
            self._add_indexed(self.folder / INDEX)
        else:
            raise CheckpointError(
                f"{self.folder} holds no weights: neither {SINGLE} nor {INDEX} is there"
                + (" (pytorch_model.bin is not read; convert it)" if self._has_bin() else "")
            )

    @property
    def bytes_total(self) -> int:
        return sum(stored.num_bytes for stored in self.tensors.values())

    def read(self, name: str, index: Sequence[range]) -> Tensor:
        """The part of a tensor at `index`, one range per dimension, on the CPU in the type it is stored in."""
        stored = self.tensors[name]
        if stored.dtype not in READABLE:
            raise CheckpointError(
                f"{stored.file}: tensor {name} has type {stored.dtype}, which is not supported; "
                f"supported: {', '.join(READABLE)}"
            )
        file = self._files[stored.file]
        try:
            if all(len(part) == size for part, size in zip(index, stored.shape, strict=True)):
                tensor: Tensor = file.get_tensor(name)
            else:
                tensor = file.get_slice(name)[tuple(slice(part.start, part.stop) for part in index)]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{stored.file}: tensor {name} cannot be read: {error}") from error
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def num_bytes(self, name: str, index: Sequence[range]) -> int:
        """Bytes that read() would read."""
        return math.prod(map(len, index)) * READABLE.get(self.tensors[name].dtype, 1)

    def close(self) -> None:
        """Unmap the files; tensors read stay valid."""
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _has_bin(self) -> bool:
        return any(self.folder.glob("pytorch_model*.bin"))

    def _add_file(self, path: Path) -> list[str]:
        """Map a file and note its tensors."""
        try:
            file: Any = safe_open(path, framework="pt", device="cpu")
            names = list(file.keys())
            for name in names:
                part = file.get_slice(name)
                self.tensors[name] = Stored(path, tuple(part.get_shape()), str(part.get_dtype()))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
        self._files[path] = file
        return names

    def _add_indexed(self, path: Path) -> None:
        """Map the files an index names; each must hold what the index says of it, and no more."""
        where = _weight_map(path)
        for file in sorted(set(where.values())):
            if Path(file).name != file or not (self.folder / file).is_file():
                raise CheckpointError(f"{path} names the file {file}, which is not in {self.folder}")
            wanted = {name for name, other in where.items() if other == file}
            held = set(self._add_file(self.folder / file))
            if wanted != held:
                what = "lacks" if wanted - held else "also holds"
                raise CheckpointError(
                    f"{self.folder / file} {what} {name_some(wanted - held or held - wanted)} ({path.name} disagrees)"
                )


def _weight_map(path: Path) -> dict[str, str]:
    where = read_object(path, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{path} must hold an object weight_map from tensor names to file names")
    return where


def name_some(names: Iterable[str], limit: int = 8) -> str:
    """The first few names and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
