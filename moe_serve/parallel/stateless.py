"""Objects between ranks over a store, without global state. Bytes from the network are decoded by msgspec, never
unpickled.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, cast

import msgspec
import numpy as np
import torch
from torch import Tensor

from moe_serve.base.errors import EngineError, RankTimeout
from moe_serve.base.messages import UNREADABLE
from moe_serve.parallel.store import PrefixStore, Store, open_store, wait_for_ranks

__all__ = [
    "ObjectGroup",
    "decode",
    "encode",
    "open_store",
    "split_tensor_along_last_dim",
]

CHUNK_BYTES = 1 << 20
"""TCPStore's server drops a connection that sends one value of more than 8 MiB."""
ARRAY_EXTENSION = 1


class ObjectGroup:
    """Ranks that pass small objects through a store: plain data, msgspec records and numpy arrays.

    Messages from one rank to another, and each rank's broadcasts, arrive in the order they were sent. What
    nobody fetched is deleted after `data_expiration_seconds`. Records come back as such if `kind` is given.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        name: str = "objects",
        data_expiration_seconds: float = 3600,
        store_timeout: float = 300,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside [0, {world_size})")
        self.rank = rank
        self.world_size = world_size
        self.name = name
        self.port = 0
        self._store: Store | None = PrefixStore(name, store)
        self._expiration = data_expiration_seconds
        self._timeout = store_timeout
        self._sent: dict[int, int] = {}
        self._received: dict[int, int] = {}
        self._heard = [0] * world_size
        self._barriers = 0
        self._published: deque[tuple[float, list[str]]] = deque()

    @classmethod
    def create(
        cls,
        host: str,
        port: int,
        rank: int,
        world_size: int,
        data_expiration_seconds: float = 3600,
        store_timeout: float = 300,
        *,
        token: str = "",
    ) -> ObjectGroup:
        """Rank 0 opens the store on host:port and keeps it; the others connect. `port` is the real one."""
        store, port = open_store(host, port, is_master=rank == 0, token=token, timeout_seconds=float(store_timeout))
        group = cls(
            store,
            rank=rank,
            world_size=world_size,
            data_expiration_seconds=data_expiration_seconds,
            store_timeout=store_timeout,
        )
        group.port = port
        return group

    def send_obj(self, obj: object, dst: int) -> None:
        """Leave an object for `dst`; does not wait for it."""
        self._check_peer(dst)
        self.expire_data()
        number = self._sent.get(dst, 0)
        self._publish(f"send/{self.rank}/{dst}/{number}", obj)
        self._sent[dst] = number + 1

    def recv_obj(self, src: int, kind: Any = Any) -> Any:
        """The next object `src` sent here; RankTimeout after the store's timeout."""
        self._check_peer(src)
        number = self._received.get(src, 0)
        key = f"send/{src}/{self.rank}/{number}"
        self._wait({src: key}, self._timeout, f"object {number} for rank {self.rank}")
        obj = self._fetch(key, kind, readers=1)
        self._received[src] = number + 1
        return obj

    def broadcast_obj(self, obj: object, src: int, kind: Any = Any) -> Any:
        """`src`'s object, on every rank; the others' `obj` is ignored."""
        if self.world_size == 1 and src == self.rank:
            return obj
        if src == self.rank:
            self._tell(obj)
            return obj
        self._check_peer(src)
        key = f"cast/{src}/{self._heard[src]}"
        self._wait({src: key}, self._timeout, f"broadcast {self._heard[src]} to rank {self.rank}")
        return self._hear(src, kind)

    def all_gather_obj(self, obj: object, kind: Any = Any) -> list[Any]:
        """Every rank's object, in order of rank."""
        if self.world_size > 1:
            self._tell(obj)
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        keys = {rank: f"cast/{rank}/{self._heard[rank]}" for rank in others}
        self._wait(keys, self._timeout, f"gathering objects in rank {self.rank}")
        return [obj if rank == self.rank else self._hear(rank, kind) for rank in range(self.world_size)]

    def barrier(self, timeout: float = 30) -> None:
        """Return when every rank is here; RankTimeout names those that did not come.

        Arrive, acknowledge that all arrived, leave: nobody passes before all know of all, and the last to
        leave wipes the barrier, so its successor starts clean. A failed barrier may be tried again.
        """
        store, number, deadline = self._open(), self._barriers, time.monotonic() + timeout
        for phase in ("arrived", "acknowledged"):
            keys = {rank: f"barrier/{number}/{phase}/{rank}" for rank in range(self.world_size)}
            store.set(keys[self.rank], "1")
            try:
                self._wait(keys, deadline - time.monotonic(), f"barrier {number} of {self.name!r} ({phase})")
            except RankTimeout:
                # Withdrawn, so that a rank that comes late does not believe this one is still waiting.
                store.delete_key(f"barrier/{number}/arrived/{self.rank}")
                store.delete_key(f"barrier/{number}/acknowledged/{self.rank}")
                raise
        self._barriers += 1
        if store.add(f"barrier/{number}/left", 1) == self.world_size:
            for rank in range(self.world_size):
                store.delete_key(f"barrier/{number}/arrived/{rank}")
                store.delete_key(f"barrier/{number}/acknowledged/{rank}")
            store.delete_key(f"barrier/{number}/left")

    def expire_data(self) -> None:
        """Delete what this rank sent longer than `data_expiration_seconds` ago."""
        store, now = self._open(), time.monotonic()
        while self._published and self._published[0][0] <= now:
            for key in self._published.popleft()[1]:
                store.delete_key(key)

    def close(self) -> None:
        """Let go of the store (on rank 0 of `create`: end it). Safe to call twice."""
        self._store = None

    def _tell(self, obj: object) -> None:
        self.expire_data()
        self._publish(f"cast/{self.rank}/{self._heard[self.rank]}", obj)
        self._heard[self.rank] += 1

    def _hear(self, src: int, kind: Any) -> Any:
        obj = self._fetch(f"cast/{src}/{self._heard[src]}", kind, readers=self.world_size - 1)
        self._heard[src] += 1
        return obj

    def _publish(self, key: str, obj: object) -> None:
        """Large objects lie in several keys; the first is written last: whoever sees it can read all."""
        store, data = self._open(), encode(obj)
        parts = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
        keys = [key, *(f"{key}/{index}" for index in range(1, len(parts)))]
        for index in range(1, len(parts)):
            store.set(keys[index], cast(str, parts[index]))
        store.set(key, cast(str, len(parts).to_bytes(4, "big") + parts[0]))
        self._published.append((time.monotonic() + self._expiration, [*keys, f"{key}/read"]))

    def _fetch(self, key: str, kind: Any, *, readers: int) -> Any:
        """Read an object that is there; the last of its readers deletes it."""
        store = self._open()
        first = store.get(key)
        keys = [key, *(f"{key}/{index}" for index in range(1, int.from_bytes(first[:4], "big")))]
        data = b"".join([first[4:], *(store.get(part) for part in keys[1:])])
        if readers == 1 or store.add(f"{key}/read", 1) == readers:
            for part in [*keys, f"{key}/read"]:
                store.delete_key(part)
        try:
            return decode(data, kind)
        except (*UNREADABLE, ValueError, TypeError) as error:  # an array may be none too
            raise EngineError(f"what lies under {key!r} in group {self.name!r} is no object: {error}") from error

    def _wait(self, keys: Mapping[int, str], timeout: float, what: str) -> None:
        wait_for_ranks(self._open(), keys, timeout=timeout, what=what)

    def _open(self) -> Store:
        if self._store is None:
            raise EngineError(f"the group {self.name!r} is closed")
        return self._store

    def _check_peer(self, rank: int) -> None:
        if not 0 <= rank < self.world_size or rank == self.rank:
            raise ValueError(f"rank {self.rank} of {self.world_size} cannot exchange objects with rank {rank}")


def encode(obj: object) -> bytes:
    """msgpack; numpy arrays of numbers as an extension. TypeError for what is neither."""
    return msgspec.msgpack.encode(obj, enc_hook=_encode_array)


def decode(data: bytes, kind: Any = Any) -> Any:
    """The object behind encode(); records need their type as `kind`."""
    return msgspec.msgpack.decode(data, type=kind, ext_hook=_decode_array)


def _encode_array(obj: object) -> msgspec.msgpack.Ext:
    if not isinstance(obj, np.ndarray) or obj.dtype.kind not in "biuf":
        raise TypeError(f"{type(obj).__name__} cannot be sent: only plain data, msgspec records and number arrays")
    payload = (obj.dtype.str, obj.shape, obj.tobytes())
    return msgspec.msgpack.Ext(ARRAY_EXTENSION, msgspec.msgpack.encode(payload))


def _decode_array(code: int, data: memoryview) -> np.ndarray[Any, Any]:
    if code != ARRAY_EXTENSION:
        raise ValueError(f"unknown msgpack extension {code}")
    dtype, shape, raw = msgspec.msgpack.decode(data, type=tuple[str, tuple[int, ...], bytes])
    return np.frombuffer(raw, dtype=np.dtype(dtype)).reshape(shape).copy()


def split_tensor_along_last_dim(tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Equal views of `tensor` cut along its last dimension; ValueError if it does not divide."""
    width = tensor.shape[-1]
    if parts < 1 or width % parts:
        raise ValueError(f"a last dimension of {width} cannot be cut into {parts} equal parts")
    return torch.split(tensor, width // parts, dim=-1) if width else (tensor,) * parts
