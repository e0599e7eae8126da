"""Real ranks for tests: processes that form a world on 127.0.0.1 and run the same function, one spawn for many cases.

No fixed ports: the parent keeps the store on port 0. A rank's failure comes back with its traceback.
"""

from __future__ import annotations

import multiprocessing as mp
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from moe_serve.base.topology import Topology
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.groups import Groups, build_groups
from moe_serve.parallel.store import open_store

HOST = "127.0.0.1"
TOKEN = "token of a test world"
GRACE_SECONDS = 3.0


class Seat:
    """What a function that runs on a rank gets: who it is, and where the world meets."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        self.rank = rank
        self.size = size
        self.host = HOST
        self.port = port
        self.token = TOKEN
        self._groups: dict[Topology, Groups] = {}

    def groups(self, topology: Topology) -> Groups:
        """The groups of this topology, formed once per spawn (by all of its ranks)."""
        if topology not in self._groups:
            self._groups[topology] = build_groups(
                topology,
                self.rank,
                store_host=self.host,
                store_port=self.port,
                token=self.token,
                device=torch.device("cpu"),
                timeout_seconds=20,
            )
        return self._groups[topology]

    def group(self, size: int | None = None) -> Group:
        """One group over the first `size` ranks (all of them if not given)."""
        return self.groups(Topology(dp=size or self.size)).world


class RankFailed(AssertionError):
    """A rank raised; the message holds its traceback."""


class Ranks:
    """`size` spawned processes. `run(fn, *args)` gives [fn(seat, *args) of each rank]; a context manager."""

    def __init__(self, size: int, *, timeout: float = 60.0) -> None:
        self.size = size
        self.timeout = timeout
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._store: object = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, only: int | None = None) -> list[Any]:
        """Run `fn` on every rank, or on the first `only`. A failure or a timeout ends the processes."""
        self._spawn()
        count = self.size if only is None else only
        for pipe in self._pipes[:count]:
            pipe.send((fn, args))
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + self.timeout
        while len(answers) + len(failures) < count:
            pending = [rank for rank in range(count) if rank not in answers | failures]
            ready = wait([self._pipes[rank] for rank in pending], timeout=max(deadline - time.monotonic(), 0))
            for rank in pending:
                if self._pipes[rank] in ready:
                    self._take(rank, answers, failures)
            if not ready:
                break
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        silent = [rank for rank in range(count) if rank not in answers | failures]
        if failures or silent:
            self.close()
            told = "\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items()))
            unheard = f"ranks {silent} gave no answer\n" if silent else ""
            raise RankFailed(f"{unheard}{told}")
        return [answers[rank] for rank in range(count)]

    def close(self) -> None:
        """End the processes; the next run() spawns new ones."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes, self._store = [], [], None

    def _take(self, rank: int, answers: dict[int, Any], failures: dict[int, str]) -> None:
        try:
            good, value = self._pipes[rank].recv()
        except (EOFError, OSError):
            failures[rank] = "the process is gone"
            return
        (answers if good else failures)[rank] = value

    def _spawn(self) -> None:
        if self._processes:
            return
        self._store, port = open_store(HOST, 0, is_master=True, token=TOKEN)
        context = mp.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.size, port), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)


def run_ranks(size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Spawn, run one function on every rank as fn(seat, *args), end. For many cases keep a `Ranks`."""
    with Ranks(size, timeout=timeout) as ranks:
        return ranks.run(fn, *args)


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    """A rank's whole life: run what the parent sends until the pipe closes."""
    torch.set_num_threads(1)
    seat = Seat(rank, size, port)
    while True:
        try:
            fn, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = (True, fn(seat, *args))
        except BaseException:  # noqa: BLE001 - the outermost loop of the process: the parent raises it
            answer = (False, traceback.format_exc())
        pipe.send(answer)
