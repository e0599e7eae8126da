"""Who reads weights when: at most so many ranks of an engine do at a time, where memory or disks bear no more.

A rank begins as soon as the one so many places before it has read. What they tell each other goes from one to one on
the CPU, so that other engines are not waited for, and devices have no say in how long a wait may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_serve.base.errors import RankTimeout
from moe_serve.parallel.collectives import Group


@dataclass(frozen=True, slots=True)
class ReadingPlace:
    """A worker's, by workers' indices: it reads after `follows` and before `precedes` (None: nobody).

    `last` are those whom nobody follows: once they have read, all have.
    """

    worker: int
    follows: int | None
    precedes: int | None
    last: range


def reading_place(worker: int, num_workers: int, at_once: int | None) -> ReadingPlace | None:
    """None where nobody has to wait: no limit, or as many as there are workers."""
    if at_once is None or at_once >= num_workers:
        return None
    return ReadingPlace(
        worker,
        follows=worker - at_once if worker >= at_once else None,
        precedes=worker + at_once if worker + at_once < num_workers else None,
        last=range(num_workers - at_once, num_workers),
    )


class ReadingOrder:
    """One rank's part in it. `ranks[worker]` is a worker's rank in `group`, which is on the CPU."""

    def __init__(self, place: ReadingPlace, group: Group, ranks: Sequence[int], *, timeout_seconds: float) -> None:
        self._place = place
        self._group = group
        self._ranks = ranks
        self._timeout = timeout_seconds

    def await_turn(self) -> None:
        """Until this rank may read. RankTimeout names whom it waited for."""
        if self._place.follows is not None:
            self._hear(self._place.follows)

    def pass_on(self) -> None:
        """This rank has read: the next may. Until all have.

        What comes after loading measures memory, and meets the others with the patience of a step.
        """
        own, behind = self._place.worker, self._place.precedes
        others = [worker for worker in range(len(self._ranks)) if worker != own]
        done = torch.ones(1, dtype=torch.uint8)
        told = others if behind is None else [behind]
        sent = [self._group.start_send(done, self._ranks[worker]) for worker in told]
        for worker in self._place.last:
            if worker != own:
                self._hear(worker)
        for each in sent:
            each.wait()

    def _hear(self, worker: int) -> None:
        """That another has read."""
        rank = self._ranks[worker]
        try:
            self._group.receive(torch.empty(1, dtype=torch.uint8), rank, timeout_seconds=self._timeout)
        except RankTimeout as error:
            raise RankTimeout(
                f"rank {self._group.ranks[rank]} has not read its weights within {self._timeout:g} s "
                "(--start-timeout-seconds), and others wait for it (--max-parallel-loading-workers)"
            ) from error
