"""Which front-end asked an engine for which request."""

from __future__ import annotations

from collections.abc import Iterable

from moe_serve.base.engine_messages import TokenEvent


class Owners:
    """Front-ends are known by their addresses."""

    def __init__(self) -> None:
        self._owners: dict[str, str] = {}

    def add(self, request_id: str, address: str) -> None:
        self._owners[request_id] = address

    def has(self, request_id: str, address: str) -> bool:
        """Whether this front-end asked for it, and it has not ended."""
        return self._owners.get(request_id) == address

    def forget(self, request_ids: Iterable[str]) -> None:
        """Unknown ones are ignored."""
        for request_id in request_ids:
            self._owners.pop(request_id, None)

    def leave(self, address: str) -> list[str]:
        """Forget a front-end; the requests that nobody waits for any more."""
        orphans = [request_id for request_id, owner in self._owners.items() if owner == address]
        self.forget(orphans)
        return orphans

    def sort(self, events: Iterable[TokenEvent]) -> dict[str, list[TokenEvent]]:
        """Events by who asked for them; with its last event a request is forgotten."""
        by_owner: dict[str, list[TokenEvent]] = {}
        for event in events:
            owner = self._owners.get(event.request_id)
            if event.finish_reason is not None:
                self.forget([event.request_id])
            if owner is not None:
                by_owner.setdefault(owner, []).append(event)
        return by_owner
