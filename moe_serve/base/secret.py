"""The world's token, and what is derived from it. The token itself never travels, and is part of no name.

Each use has an HMAC-SHA256 (RFC 2104) of its own, so that what one of them shows is of no use for another.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from moe_serve.base.errors import ConfigError

TOKEN_ENVIRONMENT = "MOE_SERVE_WORLD_TOKEN"
MIN_CHARACTERS = 16
NONCE_BYTES = 32
PROOF_BYTES = 32


def new_token() -> str:
    return secrets.token_hex(16)


def check_token(token: str) -> str:
    """The token, or ConfigError if it is too short to be a secret."""
    if len(token) < MIN_CHARACTERS:
        raise ConfigError(
            f"{TOKEN_ENVIRONMENT} has {len(token)} characters; a token is any text of {MIN_CHARACTERS} or more, known "
            "to all processes of one world and to nobody else"
        )
    return token


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def derive(token: str, purpose: str, *parts: bytes) -> bytes:
    """32 bytes that only who knows the token can make; parts of fixed lengths."""
    return hmac.digest(token.encode(), b"\0".join([b"moe-serve", purpose.encode(), b"".join(parts)]), hashlib.sha256)


def proves(given: bytes, token: str, purpose: str, *parts: bytes) -> bool:
    """Whether somebody knows the token, in constant time."""
    return hmac.compare_digest(given, derive(token, purpose, *parts))


def world_name(token: str) -> str:
    """Tells worlds apart, and may be read by anybody."""
    return derive(token, "world name").hex()[:16]
