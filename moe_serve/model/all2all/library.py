"""What the backends of other people's libraries have in common: whose error it is, and calls in two halves."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from moe_serve.base.errors import EngineError


@dataclass(frozen=True, slots=True)
class SentRoutes:
    """What combine must be told again: the slots (T, K) as the library was given them, and weights (T, K) float32."""

    slots_TK: Tensor
    weights_TK: Tensor


@contextmanager
def named(what: str, backend: str) -> Iterator[None]:
    """EngineError for what a library raises, which says neither whose it is nor what was being done."""
    try:
        yield
    except (RuntimeError, AssertionError, AttributeError) as error:
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line  # of an assertion, what was asserted
        raise EngineError(f"--all2all-backend {backend}: {what} failed in its library: {said}") from error


def begin(call: Callable[..., None], what: str, backend: str) -> Callable[[], None]:
    """Send now; gives what receives. Of libraries that split a call by `do_send` and `do_recv`."""
    with named(what, backend):
        call(do_send=True, do_recv=False)

    def receive() -> None:
        with named(what, backend):
            call(do_send=False, do_recv=True)

    return receive
