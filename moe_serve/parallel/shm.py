"""Memory that the ranks of one machine share, with a number per rank that says how far it has come. Knows no model.

    | a line of flags per rank, up to a whole page | `data`, of which the ranks agree who writes what when |

A rank writes, then publishes the next number; the others wait for that number, then read. Who waits asks now and then
whether those he waits for still live.
"""

from __future__ import annotations

import errno
import mmap
import os
import platform
import select
import time
from collections.abc import Callable

import torch

from moe_serve.base.errors import ConfigError, NoSharedMemory
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.flags import LINE_BYTES, Flags, why_no_flags
from moe_serve.parallel.memory_handover import OFFER_BYTES, Descriptors, Giver, Offer, take
from moe_serve.parallel.whereabouts import refuse_apart

PAGE_BYTES = 4096
HANDOVER_SECONDS = 20.0
LOOKS = 20
"""How often a rank looks before it lets others have its core: 2 us in Python. With more, ranks that share a core keep
each other from what they wait for: at 200 a message between two takes three times as long, at 1,000 fifteen times."""
YIELD_SECONDS = 200e-6
NAP_SECONDS = 2e-3
"""Longest sleep: a missed wake costs no more."""
ASK_SECONDS = 5e-3
"""Between two questions whether the others live."""


class SharedMemory:
    """`data` (bytes) is the same for all ranks of `group`. Made by share(), by all ranks alike."""

    def __init__(self, group: Group, memory: mmap.mmap, descriptors: Descriptors) -> None:
        self._group = group
        self._others = [rank for rank in range(group.size) if rank != group.rank]
        self._flags = Flags(memory, group.size, group.rank)
        self._descriptors = descriptors
        self._lives = select.poll()
        for life in descriptors.lives:
            self._lives.register(life, 0)  # a closed end is always told
        with torch.inference_mode(False):  # or it could not be written to outside of that mode
            self.data = torch.frombuffer(memory, dtype=torch.uint8, offset=flags_bytes(group.size))
        """Keeps the mapping for as long as it, or a view of it, is there."""

    def publish(self, number: int) -> None:
        """This rank has come to `number`; numbers rise by one."""
        self._flags.publish(number)

    def have_come(self, number: int) -> bool:
        """Whether wait() would return at once."""
        return all(self._flags.seen(rank) >= number for rank in self._others)

    def wait(self, number: int, what: str) -> None:
        """Until all ranks have come to `number`. EngineError if one is gone, RankTimeout after the group's time limit;
        both name it."""
        for rank in self._others:
            if self._flags.seen(rank) < number:
                self._wait_for(rank, number, what)

    def close(self) -> None:
        """Those who wait for this rank hear that it is gone. Safe to call twice."""
        self._descriptors.close()
        self._lives = select.poll()

    def _wait_for(self, rank: int, number: int, what: str) -> None:
        seen = self._flags.seen
        for _ in range(LOOKS):
            if seen(rank) >= number:
                return
        began = asked = time.monotonic()
        while (there := seen(rank)) < number:
            now = time.monotonic()
            if now - began < YIELD_SECONDS:
                os.sched_yield()
                continue
            if now - asked >= ASK_SECONDS:
                asked = now
                self._refuse_dead(number, what)
                if now - began >= self._group.timeout_seconds:
                    raise self._failure(what, "timed out waiting for {}", self._missing(number))
            self._flags.sleep(rank, there, NAP_SECONDS)

    def _refuse_dead(self, number: int, what: str) -> None:
        """One that is gone may have come far enough before."""
        closed = {descriptor for descriptor, _ in self._lives.poll(0)}
        gone = [rank for rank, life in zip(self._others, self._descriptors.lives, strict=True) if life in closed]
        gone = [rank for rank in gone if rank in self._missing(number)]
        if gone:
            raise self._failure(what, "the process of {} has left", gone)

    def _missing(self, number: int) -> list[int]:
        return [rank for rank in self._others if self._flags.seen(rank) < number]

    def _failure(self, what: str, how: str, ranks: list[int]) -> Exception:
        names = " and ".join(f"rank {self._group.ranks[rank]}" for rank in ranks)
        return self._group.failure(what, RuntimeError(how.format(names)))


def share(group: Group, num_bytes: int) -> SharedMemory:
    """`num_bytes` of memory for a group on CPUs, all of whose ranks call this.

    ConfigError where ranks cannot share memory at all; NoSharedMemory, on all ranks alike, where there is none to be
    had.
    """
    if reason := why_no_flags(platform.system(), platform.machine()):
        raise ConfigError(f"memory cannot be shared here: {reason}")
    refuse_apart(group, "memory cannot be shared", ("net",), "a network")
    total = flags_bytes(group.size) + -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
    deadline = time.monotonic() + min(HANDOVER_SECONDS, group.timeout_seconds)
    giver = Giver(total, group.size) if group.rank == 0 else None
    try:
        offer = _agree_on_offer(group, giver)
        if giver is None:
            return _agree_on_outcome(group, lambda: take(offer, group.rank, group.size, deadline), total)
        return _agree_on_outcome(group, lambda: giver.give(deadline), total)
    finally:
        if giver is not None:
            giver.close()


def flags_bytes(size: int) -> int:
    return -(-size * LINE_BYTES // PAGE_BYTES) * PAGE_BYTES


def _agree_on_offer(group: Group, giver: Giver | None) -> Offer:
    """The first rank's, on all ranks; NoSharedMemory if it has none."""
    packed = bytes(OFFER_BYTES) if giver is None else giver.offer.packed()
    told = group.broadcast(torch.frombuffer(bytearray(packed), dtype=torch.uint8), 0)
    offer = Offer.unpacked(bytes(told.tolist()))
    if offer.error:
        raise NoSharedMemory(f"rank {group.ranks[0]} cannot have it: {os.strerror(offer.error)}")
    return offer


def _agree_on_outcome(group: Group, fetch: Callable[[], Descriptors], total: int) -> SharedMemory:
    """Mapped on all ranks, or NoSharedMemory on all."""
    descriptors, memory, error = None, None, 0
    try:
        descriptors = fetch()
        memory = mmap.mmap(descriptors.memory, total)
        descriptors.close_memory()
    except OSError as failed:
        error = failed.errno or errno.ETIMEDOUT
    errors = group.all_gather(torch.tensor([error])).tolist()
    if memory is not None and descriptors is not None and not any(errors):
        return SharedMemory(group, memory, descriptors)
    if descriptors is not None:
        descriptors.close()
    told = (
        f"rank {rank} cannot have it: {os.strerror(error)}"
        for rank, error in zip(group.ranks, errors, strict=True)
        if error
    )
    raise NoSharedMemory("; ".join(told))
