"""What an operator sees of requests: a line for each, one for each that is refused, and what is counted. Plain ASGI."""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_serve.api.errors import PROBLEM, ApiProblem
from moe_serve.api.metrics import Metrics
from moe_serve.base.log import limit_lines
from moe_serve.base.site import with_port

LINES_PER_SECOND = 100
REFUSALS_PER_SECOND = 10
SHOWN_CHARACTERS = 200
access_log = logging.getLogger("moe_serve.access")
log = logging.getLogger(__name__)


def log_sparingly() -> None:
    """Whoever connects can cause these lines, so there is a limit to them."""
    limit_lines(access_log.name, burst=LINES_PER_SECOND, seconds=1)
    for name in (__name__, "moe_serve.api.connections", "moe_serve.engine.client", "uvicorn.error", "asyncio"):
        limit_lines(name, burst=REFUSALS_PER_SECOND, seconds=1)


class WatchRequests:
    """Outermost: what is seen here is what the client got."""

    def __init__(self, app: ASGIApp, metrics: Metrics, *, lines: bool) -> None:
        self._app, self._metrics, self._lines = app, metrics, lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._tell_refusal(scope, status)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            if self._lines:
                seconds = time.monotonic() - began
                access_log.info('%s "%s %s" %d %.3f s', _client(scope), scope["method"], _shown(scope), status, seconds)

    def _tell_refusal(self, scope: Scope, status: int) -> None:
        problem = scope.get(PROBLEM)
        if isinstance(problem, ApiProblem):
            self._metrics.refused(problem.reason)
            words = ascii(problem.message[:SHOWN_CHARACTERS])[1:-1]
            log.warning("refused %s %s of %s: %d %s", scope["method"], _shown(scope), _client(scope), status, words)


def _client(scope: Scope) -> str:
    client = scope["client"]
    return "unknown" if client is None else with_port(*client)


def _shown(scope: Scope) -> str:
    """The path as it may stand in a log: a client must not make lines of its own."""
    return ascii(scope["path"][:SHOWN_CHARACTERS])[1:-1]
