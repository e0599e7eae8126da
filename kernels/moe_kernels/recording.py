"""Operations written down as they run, to be run again in few calls: what a CUDA graph is on a GPU.

Run again, they read and write the same memory: whoever records hands in what changes as tensors that stay, and fills
them anew. What operations make lies in a Workspace, which the recordings that use it share: each overwrites what the
others left. Between the operations there may be nothing that computes, copies or looks at a number, or it would not
happen again: Recording.missed says whether there was. What cannot be recorded stands in apart(), and is called again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_kernels import paths

ALIGNMENT = 64
CHUNK_BYTES = 1 << 20


class Arena:
    """Memory that is handed out from the beginning again after restart(); an address once handed out stays good."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._chunk = self._used = 0

    @property
    def num_bytes(self) -> int:
        return sum(len(chunk) for chunk in self._chunks)

    def restart(self) -> None:
        self._chunk = self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """(num_bytes,) uint8, aligned to a cache line."""
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        while self._chunk < len(self._chunks) and self._used + size > len(self._chunks[self._chunk]):
            self._chunk, self._used = self._chunk + 1, 0
        if self._chunk == len(self._chunks):
            self._chunks.append(torch.empty(max(size, CHUNK_BYTES) + ALIGNMENT, dtype=torch.uint8))
            self._used = -self._chunks[-1].data_ptr() % ALIGNMENT
        first, self._used = self._used, self._used + size
        return self._chunks[self._chunk][first : first + num_bytes]


class Workspace:
    """Two arenas by turns, one for each layer: what a layer makes is there for the next one, and then no more."""

    def __init__(self) -> None:
        self._arenas = (Arena(), Arena())
        self._turn = 0

    @property
    def num_bytes(self) -> int:
        return sum(arena.num_bytes for arena in self._arenas)

    def next_layer(self) -> None:
        """What the layer before the last one made may be written over from now on."""
        self._turn = 1 - self._turn
        self._arenas[self._turn].restart()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        return self._arenas[self._turn].take(num_bytes).view(dtype).view(shape)


Apart = Callable[[Any], Tensor]


@dataclass(frozen=True, slots=True)
class _Part:
    """Operations, and what is called after them: its result goes to `place`, if it has one."""

    lines: Tensor
    work: Callable[[Any], Tensor | None] | None
    place: Tensor | None


class Recording:
    """What ran within record(). `missed`: the first call of torch's that a replay would leave out, or empty;
    `watches` while such calls would be missed."""

    def __init__(self, workspace: Workspace) -> None:
        self.missed = ""
        self.watches = True
        self._workspace = workspace
        self._path = ""
        self._noted: list[bytes] = []
        self._parts: list[_Part] = []

    @property
    def num_operations(self) -> int:
        return sum(len(part.lines) for part in self._parts)

    def replay(self, given: object = None) -> None:
        """All operations again, in their order, on what their memory holds now; `given` to what stands apart()."""
        assert self._parts, "still being recorded"
        assert not self.missed
        for part in self._parts:
            if len(part.lines):
                paths.replay(self._path, part.lines)
            made = None if part.work is None else part.work(given)
            if made is not None:
                assert part.place is not None
                part.place.copy_(made)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        with self._unwatched():
            return self._workspace.empty(shape, dtype)

    def next_layer(self) -> None:
        self._workspace.next_layer()

    def note(self, path: str, operation: int, words: tuple[int | float, ...]) -> None:
        assert self._path in ("", path), "one recording, one path"
        self._path = path
        kinds = "".join("d" if isinstance(word, float) else "q" for word in words)
        line = struct.pack(f"=q{kinds}", operation, *words)
        self._noted.append(line.ljust(8 * (1 + paths.MAX_WORDS), b"\0"))

    def apart(self, work: Apart, given: object) -> Tensor:
        with self._unwatched():
            paths.this_thread.recorder = None
            try:
                made = work(given)
            finally:
                paths.this_thread.recorder = self
            place = self._workspace.empty(tuple(made.shape), made.dtype).copy_(made)
            self.end(work, place)
        return place

    def between(self, work: Callable[[Any], None], given: object) -> None:
        work(given)
        self.end(work)

    def end(self, work: Callable[[Any], Tensor | None] | None = None, place: Tensor | None = None) -> None:
        """Of a part: nothing more comes before `work`."""
        lines = torch.frombuffer(bytearray(b"".join(self._noted) or bytes(8)), dtype=torch.int64)
        self._parts.append(
            _Part(lines[: len(self._noted) * (1 + paths.MAX_WORDS)].view(-1, 1 + paths.MAX_WORDS), work, place)
        )
        self._noted = []

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        before, self.watches = self.watches, False
        try:
            yield
        finally:
            self.watches = before


@contextmanager
def record(workspace: Workspace) -> Iterator[Recording]:
    """Run what is within, and write down its operations. Not within another one in the same thread."""
    assert paths.this_thread.recorder is None
    recording = Recording(workspace)
    paths.this_thread.recorder = recording
    workspace.next_layer()
    try:
        with _Watch(recording):
            yield recording
    finally:
        paths.this_thread.recorder = None
    recording.end()


def next_layer() -> None:
    """Where one layer ends and the next begins; of no effect where nothing is recorded."""
    recorder = paths.this_thread.recorder
    if recorder is not None:
        recorder.next_layer()


def apart(work: Apart, given: object) -> Tensor:
    """work(given), which is not recorded but called again by every replay, with what that is given.

    `work` may keep tensors that operations of the same layer made: they are at the same place each time. Give it them
    by partial(): a variable of a closure may be another tensor by then. What it gives has one shape and type.
    """
    recorder = paths.this_thread.recorder
    return work(given) if recorder is None else recorder.apart(work, given)


def between(work: Callable[[Any], None], given: object) -> None:
    """work(given), and again in its place in every replay, with what that is given; it touches no tensor."""
    recorder = paths.this_thread.recorder
    if recorder is None:
        work(given)
    else:
        recorder.between(work, given)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every call of torch's: those that only look at memory in another shape are not missed in a replay."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled, and to keep torch's compiler away torch would import it: two seconds, in a step."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        recording = self._recording
        if recording.watches and not recording.missed and (func._schema.is_mutable or not _only_views(made, args)):
            recording.missed = str(func)
        return made


def _only_views(made: object, args: tuple[object, ...]) -> bool:
    """Everything that came out lies in the memory of something that went in."""
    storages = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
    out = made if isinstance(made, list | tuple) else [made]
    return all(isinstance(each, Tensor) and each.untyped_storage().data_ptr() in storages for each in out)
