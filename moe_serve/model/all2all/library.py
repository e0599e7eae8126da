"""What the backends of other people's libraries have in common: whose error it is."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from moe_serve.base.errors import EngineError


@contextmanager
def named(what: str, backend: str) -> Iterator[None]:
    """EngineError for what a library raises, which says neither whose it is nor what was being done."""
    try:
        yield
    except (RuntimeError, AssertionError, AttributeError) as error:
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # of an assertion, what was asserted
        raise EngineError(f"--all2all-backend {backend}: {what} failed in its library: {said}") from error
