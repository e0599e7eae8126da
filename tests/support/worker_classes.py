"""Worker classes of somebody else's, as --worker-cls and --worker-extension-cls name them."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from moe_serve.base.commands import Command, LoadModel, Reply
from moe_serve.worker.worker import Worker

GREETINGS = "TEST_GREETINGS"
"""The variable with the folder that a NamedWorker writes to."""


class Greeting:
    """An extension."""

    def greet(self) -> str:
        """For a NamedWorker to tell."""
        return f"hello from {type(self).__name__}"


class NamedWorker(Worker):
    """Tells once who it is: a file for each process in the folder of GREETINGS."""

    def handle(self, command: Command) -> Reply:
        """As any worker."""
        if isinstance(command, LoadModel):
            told = self.greet() if isinstance(self, Greeting) else type(self).__name__
            Path(os.environ[GREETINGS], str(os.getpid())).write_text(told)
        return super().handle(command)


SMALL_FILE_BYTES = 1 << 16
"""Enough for the log of a start, and too little for what ranks share of rows."""


class WithoutMemory(Worker):
    """May make no large file while it loads, so its ranks have no memory to share."""

    def handle(self, command: Command) -> Reply:
        """As any worker."""
        if not isinstance(command, LoadModel):
            return super().handle(command)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE_BYTES, before[1]))
        try:
            return super().handle(command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Clashing:
    """An extension that a worker has no room for."""

    def handle(self) -> None:
        """Also a name of Worker."""

    def close(self) -> None:
        """The same."""


NOT_A_CLASS = 5
