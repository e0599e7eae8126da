"""Who may use what: the API key, the key for orders, and web pages of strangers. Plain ASGI.

Orders change how the server runs (POST under /eplb). Without any key they are taken from this machine only, and never
from a web page of another origin: a browser on this machine would carry its requests here as its user's own.
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from moe_serve.api.errors import ApiProblem, problem_of
from moe_serve.base.config import ServerSection
from moe_serve.base.errors import NotAllowed

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics", "/version"})
ORDERS = "/eplb/"


class Access:
    """Every path but the open ones needs `Authorization: Bearer KEY` where a key is set."""

    def __init__(self, app: ASGIApp, server: ServerSection) -> None:
        self._app = app
        key, admin = server.api_key, server.admin_api_key
        self._key = None if key is None else key.get_secret_value().encode()
        self._admin_key = self._key if admin is None else admin.get_secret_value().encode()
        self._origins = frozenset(server.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await problem.answer(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiProblem | None:
        if scope["path"] in OPEN_PATHS:
            return None
        order = scope["path"].startswith(ORDERS) and scope["method"] not in ("GET", "HEAD")
        key = self._admin_key if order else self._key
        if key is not None:
            return None if hmac.compare_digest(_bearer(scope), key) else _wrong_key(order)
        if order and not _from_here(scope):
            return problem_of(
                NotAllowed("without a key, orders are taken only from this machine (server option --admin-api-key)")
            )
        if order and self._foreign(header(scope, b"origin"), header(scope, b"host")):
            return problem_of(
                NotAllowed("without a key, no web page of another origin may give orders (option --allowed-origins)")
            )
        return None

    def _foreign(self, origin: bytes, host: bytes) -> bool:
        """A page's origin is its own word only where it names this machine: other names may be made to point here."""
        if not origin or origin.decode("latin-1") in self._origins:
            return False
        try:
            parts = urlsplit(origin.decode("latin-1"))
            return parts.netloc.encode("latin-1") != host or not _names_this_machine(parts.hostname or "")
        except ValueError:
            return True


def header(scope: Scope, name: bytes) -> bytes:
    """The first value of a header, or nothing."""
    return next((bytes(value) for key, value in scope["headers"] if key == name), b"")


def _wrong_key(order: bool) -> ApiProblem:
    return ApiProblem(
        401,
        "a valid API key is needed: send the header `Authorization: Bearer KEY` (server option "
        f"{'--admin-api-key, or --api-key' if order else '--api-key'})",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
        reason="key",
    )


def _bearer(scope: Scope) -> bytes:
    """The token of `Authorization: Bearer TOKEN`, or nothing."""
    scheme, _, token = header(scope, b"authorization").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _from_here(scope: Scope) -> bool:
    return scope["client"] is not None and _is_loopback(scope["client"][0])


def _names_this_machine(host: str) -> bool:
    return host == "localhost" or _is_loopback(host)


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback
