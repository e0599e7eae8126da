"""Something under way between ranks: a collective, or rows that travel to their experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")
Other = TypeVar("Other")


def _at_once() -> bool:
    return True


class Pending(Generic[Value]):
    """`wait()`, called once, gives its result or raises what went wrong."""

    __slots__ = ("_finish", "_is_done")

    def __init__(self, finish: Callable[[], Value], is_done: Callable[[], bool] = _at_once) -> None:
        self._finish = finish
        self._is_done = is_done

    def is_done(self) -> bool:
        """Whether wait() would not wait for another rank."""
        return self._is_done()

    def wait(self) -> Value:
        return self._finish()

    def then(self, work: Callable[[Value], Other]) -> Pending[Other]:
        """The same with some work of this rank's behind it, which wait() does."""
        return Pending(lambda: work(self.wait()), self._is_done)
