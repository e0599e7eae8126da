"""The surroundings of an engine's workers on 127.0.0.1: a real coordinator in a thread of its own, and the store."""

from __future__ import annotations

import asyncio
import threading
from typing import Self

from moe_serve.base.commands import Meeting
from moe_serve.base.site import Site
from moe_serve.base.topology import Topology
from moe_serve.parallel.store import open_store
from moe_serve.world.coordinator import Coordinator
from moe_serve.world.fleet import Fleet

HOST = "127.0.0.1"
TOKEN = "token of a test world"
START_SECONDS = 10.0


class World:
    """Use as a context manager; `meeting` is what an executor is told."""

    def __init__(self, topology: Topology) -> None:
        fleet = Fleet(topology=topology, agreement={}, has_workers=True, step_timeout_seconds=3600)
        self._coordinator = Coordinator(fleet, token=TOKEN)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._store: object = None

    @property
    def meeting(self) -> Meeting:
        return Meeting(
            dp_rank=0,
            store_host=HOST,
            store_port=self._store_port,
            coordinator_host=HOST,
            coordinator_port=self._port,
            token=TOKEN,
            site=Site(address=HOST),
        )

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(self._coordinator.start(HOST, 0), self._loop)
        self._port = starting.result(START_SECONDS)
        self._store, self._store_port = open_store(HOST, 0, is_master=True, token=TOKEN)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._coordinator.close(), self._loop).result(START_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_SECONDS)
        self._loop.close()
        self._thread.join(START_SECONDS)
