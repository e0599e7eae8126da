"""How processes that somebody else started one by one come together: at a store, with equal options, in groups."""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Sequence

import msgspec

from moe_serve.base.commands import Meeting
from moe_serve.base.config import differing_fields
from moe_serve.base.errors import ConfigError, RankTimeout
from moe_serve.base.launched import LaunchedProcess
from moe_serve.base.site import Site, local_address, with_port
from moe_serve.base.topology import Topology
from moe_serve.parallel.groups import ControlGroup, control_group
from moe_serve.parallel.listeners import deafen, listeners
from moe_serve.parallel.stateless import ObjectGroup
from moe_serve.parallel.store import Store, found_world, open_store, wait_for_ranks
from moe_serve.world.member import threads_per_rank

SEED_BITS = 63
REMIND_SECONDS = 15.0
log = logging.getLogger(__name__)


class Introduction(msgspec.Struct, frozen=True, kw_only=True):
    """What each process tells all others first. `run_seed` counts of process 0 only."""

    agreement: dict[str, str]
    host: str
    run_seed: int


class Gathering:
    """All processes of a world, met by this one: `run_seed` is the same in all of them. They have `patience` seconds to
    come, and whoever waits says for whom now and then.

    Raises ConfigError where the processes were given different options, RankTimeout naming who has not come.
    """

    def __init__(
        self,
        process: LaunchedProcess,
        topology: Topology,
        agreement: dict[str, str],
        *,
        token: str,
        patience: float,
    ) -> None:
        self._process = process
        self._topology = topology
        self._token = token
        self._patience = patience
        before = listeners()
        self._store: Store | None = self._open_store()  # which lives as long as process 0 keeps it
        self._doors = listeners() - before
        self._hosts, self.run_seed = self._introduce(self._store, agreement)

    def meeting(self) -> Meeting:
        """Where this engine's workers find everybody; there is no coordinator."""
        process, topology = self._process, self._topology
        neighbours = [number for number, host in enumerate(self._hosts) if host == self._hosts[process.number]]
        per_process = topology.num_workers if process.holds_engine else 1
        ranks_here = len(neighbours) * per_process
        place = neighbours.index(process.number) if process.local_number is None else process.local_number
        # Of this engine's first worker, which may be another process.
        first = place * per_process - (0 if process.holds_engine else topology.worker_index(process.number))
        return Meeting(
            dp_rank=process.dp_rank(topology),
            store_host=process.host,
            store_port=process.port,
            coordinator_host="",
            coordinator_port=0,
            token=self._token,
            site=Site(
                address=local_address(process.host, process.port),
                ranks_here=ranks_here,
                local_rank=first,
                threads=threads_per_rank(ranks_here),
            ),
        )

    def group(self, name: str, members: Sequence[int], timeout_seconds: float) -> ControlGroup:
        """A group of these processes, this one among them."""
        return control_group(
            name,
            self._process.number,
            members,
            store_host=self._process.host,
            store_port=self._process.port,
            token=self._token,
            timeout_seconds=timeout_seconds,
        )

    def shut_doors(self) -> None:
        """All have met: the store takes nobody in any more, if it is ours."""
        deafen(self._doors)

    def close(self) -> None:
        """Let go of the store."""
        self._store = None

    def _open_store(self) -> Store:
        """Open it, or find it; who waits for process 0 says so now and then."""
        process, begun = self._process, time.monotonic()
        where = with_port(process.host, process.port)
        while True:
            try:
                if process.store_stands:
                    return found_world(process.host, process.port, token=self._token, timeout_seconds=REMIND_SECONDS)
                return open_store(
                    process.host,
                    process.port,
                    is_master=process.opens_store,
                    token=self._token,
                    timeout_seconds=REMIND_SECONDS,
                )[0]
            except RankTimeout as error:
                waited = time.monotonic() - begun
                if waited > self._patience:
                    raise RankTimeout(f"{error} (tried for {waited:.0f} s, --start-timeout-seconds)") from error
                log.warning("waiting for the store at %s, %.0f s: %s", where, waited, error)

    def _await_all(self, store: Store) -> None:
        """Until every process has come to the store; who is missing is said now and then."""
        begun = time.monotonic()
        store.set(f"came/{self._process.number}", "1")
        keys = {number: f"came/{number}" for number in range(self._process.size)}
        while True:
            waited = time.monotonic() - begun
            left = self._patience - waited
            try:
                wait_for_ranks(
                    store, keys, timeout=min(left, REMIND_SECONDS), what="meeting all processes of this world"
                )
                return
            except RankTimeout as error:
                if left <= REMIND_SECONDS:
                    raise
                log.warning("%s, %.0f s in all", error, waited)

    def _introduce(self, store: Store, agreement: dict[str, str]) -> tuple[list[str], int]:
        """Everybody's host, and the seed of this run; ConfigError if the options differ."""
        process = self._process
        self._await_all(store)
        group = ObjectGroup(
            store, rank=process.number, world_size=process.size, name="introductions", store_timeout=self._patience
        )
        own = Introduction(agreement=agreement, host=socket.gethostname(), run_seed=secrets.randbits(SEED_BITS))
        told: list[Introduction] = group.all_gather_obj(own, Introduction)
        for number, each in enumerate(told):
            if differing := differing_fields(told[0].agreement, each.agreement):
                raise ConfigError(
                    f"process {number} was given other options than process 0: {'; '.join(differing)}; all of one "
                    "world need the same"
                )
        return [each.host for each in told], told[0].run_seed
