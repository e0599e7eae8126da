"""Any failure -> OpenAI's error shape, for a response, an event in a stream, or a middleware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moe_serve.base.errors import (
    BodyTooLarge,
    BodyTooSlow,
    EngineDead,
    MoEServeError,
    NotAllowed,
    Overloaded,
    RefusalReason,
    RequestError,
    RequestFailed,
)

PROBLEM = "moe_serve.problem"
"""Key of a request's scope: the ApiProblem it was answered with."""


class ErrorFields(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


@dataclass(frozen=True, slots=True)
class ApiProblem:
    """An error as HTTP says it."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    reason: RefusalReason = "request"

    def body(self) -> dict[str, ErrorFields]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(
            msgspec.json.encode(self.body()), self.status, dict(self.headers), media_type="application/json"
        )

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with it, where whoever watches can see why."""
        scope[PROBLEM] = self
        await self.response()(scope, receive, send)


def problem_of(error: Exception) -> ApiProblem:
    """The status and words for an error; what is not ours becomes a 500 without details."""
    if isinstance(error, RequestError):
        reason = _REASONS.get(type(error), "request")
        return ApiProblem(error.status, str(error), param=error.param, code=error.code, reason=reason)
    if isinstance(error, Overloaded):
        headers = {"Retry-After": str(error.retry_after)}
        message = str(error)
        return ApiProblem(503, message, "service_unavailable", code="unavailable", headers=headers, reason=error.reason)
    if isinstance(error, EngineDead):
        return ApiProblem(503, str(error), "server_error", code="engine_dead", reason="not_ready")
    if isinstance(error, RequestFailed):
        return ApiProblem(500, str(error), "server_error", code=error.code, reason="failure")
    if isinstance(error, MoEServeError):
        return ApiProblem(500, str(error), "server_error", code="engine_error", reason="failure")
    if isinstance(error, HTTPException):
        return ApiProblem(error.status_code, str(error.detail), headers=error.headers or {})
    message = "internal error; the server's log has the details"
    return ApiProblem(500, message, "server_error", code="internal_error", reason="failure")


async def answer_error(request: Request, error: Exception) -> Response:
    """As an exception handler of the application."""
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        what = "no such path" if error.status_code == 404 else "method not allowed"
        error = HTTPException(error.status_code, f"{what}: {request.method} {request.url.path[:200]}", error.headers)
    request.scope[PROBLEM] = problem = problem_of(error)
    return problem.response()


_REASONS: Mapping[type[RequestError], RefusalReason] = {
    BodyTooLarge: "body_size",
    BodyTooSlow: "slow",
    NotAllowed: "origin",
}
