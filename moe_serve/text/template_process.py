"""The process that compiles and renders chat templates for another one, and can be ended at any moment.

Started as `python -m moe_serve.text.template_process` with a socket as its standard input. The kernel ends it when a
template takes too long (SIGALRM), so it outlives neither its limit nor, by more than that, its parent.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
from typing import Any

from moe_serve.text.template_wire import encode, receive, send
from moe_serve.text.templates import Templates

MEMORY_BYTES = 2**30
FOREVER = float("inf")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the socket
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    parent = socket.socket(fileno=0)
    with contextlib.suppress(EOFError, OSError):
        setup = json.loads(receive(parent, FOREVER))
        with _Limit(setup["seconds"]):
            templates = Templates(setup)
        send(parent, encode(templates.broken), FOREVER)
        while True:
            _answer(parent, templates)


def _answer(parent: socket.socket, templates: Templates) -> None:
    body = receive(parent, FOREVER)
    with _Limit(templates.seconds):
        answer: dict[str, Any] = templates.render(body)
    send(parent, encode(answer), FOREVER)


class _Limit:
    """Within it the process lives for so many seconds only."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
