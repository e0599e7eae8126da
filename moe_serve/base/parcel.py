"""Bytes that are too many to be copied or sent at once: a record that was encoded elsewhere, in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

PIECE_BYTES = 1 << 16
"""Copied in some microseconds."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Its bytes are those of the pieces, one after the other."""

    pieces: tuple[bytes | memoryview, ...]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", sum(len(piece) for piece in self.pieces))

    @classmethod
    def of(cls, body: bytes) -> Parcel:
        """Views of `body`, none of them large."""
        return cls(tuple(memoryview(body)[start : start + PIECE_BYTES] for start in range(0, len(body), PIECE_BYTES)))

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[bytes | memoryview]:
        return iter(self.pieces)

    def join(self) -> bytes:
        """All of it, copied at once."""
        return b"".join(self.pieces)
