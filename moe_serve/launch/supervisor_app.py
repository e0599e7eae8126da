"""The supervisor's own HTTP server: whether the ranks of its node are ready, who is not and why, and who they are."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import Response

from moe_serve.api.connections import HttpServer
from moe_serve.api.errors import answer_error
from moe_serve.api.metrics import Metrics
from moe_serve.api.middleware import LimitBody
from moe_serve.api.orders import Access
from moe_serve.api.watching import WatchRequests
from moe_serve.base.config import ServerSection
from moe_serve.base.errors import MoEServeError
from moe_serve.base.version import package_version
from moe_serve.launch.rank_launchers import RankReport

STOPPING = "this node is shutting down"


class SupervisorServer(HttpServer):
    """Signals are the supervisor's, not uvicorn's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_server(
    server: ServerSection, *, reports: Callable[[], Awaitable[Sequence[RankReport]]], is_stopping: Callable[[], bool]
) -> SupervisorServer:
    """With the limits of the ranks' own servers; `reports` is asked for each answer that depends on the ranks."""
    metrics = Metrics("", (), dict)  # nobody reads them: the ranks' own servers have the metrics
    app = FastAPI(title="moe-serve supervisor", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    routes = SupervisorRoutes(reports, is_stopping)
    for path in ("/livez", "/readyz", "/health", "/version", "/ranks"):
        app.add_api_route(path, getattr(routes, path[1:]), methods=["GET", "HEAD"], response_model=None)
    app.add_middleware(LimitBody, server=server)
    app.add_middleware(Access, server=server)
    app.add_middleware(WatchRequests, metrics=metrics, lines=server.access_log)
    for kind in (MoEServeError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    return SupervisorServer(app, server, metrics)


class SupervisorRoutes:
    """Its handlers."""

    def __init__(self, reports: Callable[[], Awaitable[Sequence[RankReport]]], is_stopping: Callable[[], bool]) -> None:
        self._reports, self._is_stopping = reports, is_stopping

    async def livez(self) -> Response:
        """Of this process alone: a rank that hangs is missed by its world, which then ends."""
        return _json({"alive": True})

    async def readyz(self) -> Response:
        """200 when every rank of the node is ready."""
        reports = await self._reports()
        reason = STOPPING if self._is_stopping() else why_not_ready(reports)
        return _json({"ready": True}) if reason is None else _json({"ready": False, "reason": reason}, 503)

    health = readyz

    async def version(self) -> Response:
        return _json({"version": package_version()})

    async def ranks(self) -> Response:
        return _json({"ranks": await self._reports()})


def why_not_ready(reports: Sequence[RankReport]) -> str | None:
    """Who of a node is not ready, and why; None when all are."""
    if not reports:
        return "no rank was started yet"
    return (
        "; ".join(f"rank {each.rank} (port {each.port}): {each.reason}" for each in reports if not each.ready) or None
    )


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
