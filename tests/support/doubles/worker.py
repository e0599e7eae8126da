"""A worker whose backends call doubles: for --worker-cls of a server that tests.support.doubles.serve starts."""

from __future__ import annotations

from moe_serve.worker.worker import Worker
from tests.support.doubles import open_everything

open_everything()


class OverDoubles(Worker):
    """As any, in a process where every library has its double."""
