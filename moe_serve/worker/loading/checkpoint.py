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
from moe_serve.base.weight_files import INDEX, SINGLE, weight_map

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
    """Open until closed. `tensors` by name; `bytes_read` grows with every read().

    Where there is an index it says which file a tensor is taken from. `unnamed` tensors it does not name; `absent` are
    those it names and no file holds.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.bytes_read = 0
        self._files: dict[Path, Any] = {}
        self.tensors: dict[str, Stored] = {}
        self.unnamed: frozenset[str] = frozenset()
        self.absent: tuple[str, ...] = ()
        single = self.folder / SINGLE
        if single.is_file():
            self.tensors = self._map_file(single)
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

    def _map_file(self, path: Path) -> dict[str, Stored]:
        """Map a file; its tensors."""
        try:
            file: Any = safe_open(path, framework="pt", device="cpu")
            found = {}
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                part = file.get_slice(name)
                found[name] = Stored(path, tuple(part.get_shape()), str(part.get_dtype()))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
        self._files[path] = file
        return found

    def _add_indexed(self, path: Path) -> None:
        """Map the files an index names. A tensor that lies elsewhere than it says, or is not named, is found too."""
        where = weight_map(path)
        held = {file: self._map_file(self.folder / file) for file in sorted(set(where.values()))}
        for found in held.values():
            self.tensors |= found
        self.tensors |= {name: held[file][name] for name, file in where.items() if name in held[file]}
        self.unnamed = frozenset(self.tensors.keys() - where.keys())
        self.absent = tuple(sorted(where.keys() - self.tensors.keys()))


def name_some(names: Iterable[str], limit: int = 8) -> str:
    """The first few names and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
