"""Every error this package raises on purpose.

MoEServeError
├── ConfigError          what the operator asked for cannot be (exit code 2 at start)
│   ├── CheckpointError  a model folder that is absent, broken or not supported
│   └── Conflict         an order about load balancing that cannot be carried out now (HTTP 409)
├── MissingExtra         an optional library is not installed
├── RequestError         what a client asked for cannot be (HTTP 400)
│   ├── ContextTooLong   prompt + max_tokens does not fit max_model_len
│   ├── UnknownModel     no such model here (HTTP 404)
│   ├── NotAllowed       an order from somebody who may not give it (HTTP 403)
│   ├── BodyTooLarge     the body is over its limit (HTTP 413)
│   ├── BodyTooSlow      the body did not come in time (HTTP 408)
│   └── NotJson          the body says that it is something else (HTTP 415)
├── Overloaded           not now (HTTP 503 with Retry-After)
├── ServerError          a server that `moe-serve chat` talks to refused or broke off
├── RequestFailed        one request came to grief, the others go on (HTTP 500)
└── EngineError          the serving world broke (HTTP 500/503; the server ends)
    ├── WorkerDied       a worker process is gone
    ├── EngineDead       an engine, or the world it belongs to, is gone
    ├── NoSharedMemory   ranks of one machine have no memory to share; there are other ways
    └── RankTimeout      a bounded wait ran out; the message names who is missing
        └── NotYet       a world that cannot take this process now, but perhaps in a moment

A message says what was given, what is allowed and which option changes it.
`assert` is for our own bugs only.
"""

from __future__ import annotations

from typing import Literal

RefusalReason = Literal[
    "queued_reqs",
    "queued_tokens",
    "connections",
    "unfinished_bodies",
    "not_ready",
    "slow",
    "malformed",
    "key",
    "origin",
    "body_size",
    "request",
    "failure",
]
"""Why the HTTP server refused something, as its metric and its log lines say it."""


class MoEServeError(Exception):
    """Root of the tree."""


class ConfigError(MoEServeError, ValueError):
    """The operator's configuration is impossible; nothing was started."""


class CheckpointError(ConfigError):
    """A model folder is absent, broken or not supported."""


class Conflict(ConfigError):
    """An order cannot be carried out now."""


class MissingExtra(MoEServeError, ImportError):
    """A named implementation needs a library that is not installed."""


class RequestError(MoEServeError, ValueError):
    """A client's request is impossible. `param` names the offending field, as OpenAI's API does."""

    status = 400
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextTooLong(RequestError):
    """The prompt and the tokens asked for do not fit the context."""

    code = "context_length_exceeded"


class UnknownModel(RequestError):
    """The request names a model that is not served here."""

    status = 404
    code = "model_not_found"


class NotAllowed(RequestError):
    """An order from somebody who may not give it."""

    status = 403
    code = "forbidden"


class BodyTooLarge(RequestError):
    """The request body is over the limit."""

    status = 413
    code = "body_too_large"


class BodyTooSlow(RequestError):
    """The request body did not come in time."""

    status = 408
    code = "body_too_slow"


class NotJson(RequestError):
    """The request body says that it is something else than JSON."""

    status = 415


class Overloaded(MoEServeError):
    """The server cannot take this request now. `retry_after` is in seconds; `reason` is a label of its metric."""

    def __init__(self, message: str, *, retry_after: int = 5, reason: RefusalReason = "not_ready") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reason: RefusalReason = reason


class ServerError(MoEServeError):
    """A server refused a request, or its answer broke off. `code` as OpenAI's API gives it."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class RequestFailed(MoEServeError):
    """The engine could not go on with this one request, which was none of the client's mistakes."""

    code = "request_failed"


class EngineError(MoEServeError, RuntimeError):
    """The serving world broke."""


class WorkerDied(EngineError):
    """A worker process is gone."""


class EngineDead(EngineError):
    """An engine, or the world it belongs to, is gone."""


class NoSharedMemory(EngineError):
    """Ranks of one machine have no memory to share. All of them are told, and can agree on another way."""


class RankTimeout(EngineError, TimeoutError):
    """A bounded wait ran out; the message names the ranks that are missing."""


class NotYet(RankTimeout):
    """A world cannot take this process now. It is worth to ask again for `patience_seconds`."""

    def __init__(self, message: str, *, patience_seconds: float) -> None:
        super().__init__(message)
        self.patience_seconds = patience_seconds


def shown(value: object) -> str:
    """A value as an error message may repeat it: short."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
