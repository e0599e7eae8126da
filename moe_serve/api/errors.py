"""Any failure -> OpenAI's error shape, for a response, an event in a stream, or a middleware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from moe_serve.base.errors import EngineDead, MoEServeError, Overloaded, RequestError, RequestFailed


class BodyTooLarge(RequestError):
    """The request body is over the limit."""

    status = 413
    code = "body_too_large"


class NotJson(RequestError):
    """The request body says that it is something else than JSON."""

    status = 415


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

    def body(self) -> dict[str, ErrorFields]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(
            msgspec.json.encode(self.body()), self.status, dict(self.headers), media_type="application/json"
        )


def problem_of(error: Exception) -> ApiProblem:
    """The status and words for an error; what is not ours becomes a 500 without details."""
    if isinstance(error, RequestError):
        return ApiProblem(error.status, str(error), param=error.param, code=error.code)
    if isinstance(error, Overloaded):
        headers = {"Retry-After": str(error.retry_after)}
        return ApiProblem(503, str(error), "service_unavailable", code="unavailable", headers=headers)
    if isinstance(error, EngineDead):
        return ApiProblem(503, str(error), "server_error", code="engine_dead")
    if isinstance(error, RequestFailed):
        return ApiProblem(500, str(error), "server_error", code=error.code)
    if isinstance(error, MoEServeError):
        return ApiProblem(500, str(error), "server_error", code="engine_error")
    if isinstance(error, HTTPException):
        return ApiProblem(error.status_code, str(error.detail), headers=error.headers or {})
    return ApiProblem(500, "internal error; the server's log has the details", "server_error", code="internal_error")
