"""Whether this machine has IPv6 at home."""

from __future__ import annotations

import socket


def why_no_ipv6() -> str:
    """Why nothing can live on ::1 here; "" where it can."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        return f"::1 cannot be bound here: {error}"
    return ""
