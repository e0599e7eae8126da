"""Fields that no server known to us has: named in a warning, once for each client and field, or refused.

A stranger can send any number of names, so what is remembered and what is logged are bounded.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from moe_serve.base.errors import RequestError, shown

MAX_CLIENTS = 1024  # whom we remember; the one that was heard longest ago is forgotten first
MAX_NAMES = 32  # named for each client, and taken in one request
MAX_NAME_LENGTH = 100
LINES_PER_SECOND = 10
log = logging.getLogger(__name__)


class UnknownFields:
    """What becomes of unknown fields. `strict` refuses them (--strict-fields)."""

    def __init__(self, *, strict: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._strict, self._clock = strict, clock
        self._told: OrderedDict[str, set[str]] = OrderedDict()
        self._began, self._lines = clock(), 0

    def meet(self, client: str, names: Sequence[str]) -> None:
        """A request of `client` has fields of these names. RequestError if they are refused."""
        if not names:
            return
        for name in names:
            if self._strict or len(name) > MAX_NAME_LENGTH:
                raise RequestError(f"unrecognized field: {shown(name)}", param=name[:200])
        if len(names) > MAX_NAMES:
            first = ", ".join(map(shown, names[:3]))
            raise RequestError(f"more than {MAX_NAMES} unrecognized fields: {first}, ...", param=names[0])
        self._tell(client, names)

    def _tell(self, client: str, names: Sequence[str]) -> None:
        told = self._told.setdefault(client, set())
        self._told.move_to_end(client)
        if len(self._told) > MAX_CLIENTS:
            self._told.popitem(last=False)
        news = [name for name in names if name not in told][: MAX_NAMES - len(told)]
        # Where lines are held back, nothing counts as told: the client's next request is another chance.
        if news and self._may_log():
            told.update(news)
            words = ", ".join(map(shown, news))
            log.warning("%s sends unknown fields, which are ignored: %s (--strict-fields refuses them)", client, words)

    def _may_log(self) -> bool:
        now = self._clock()
        if now - self._began >= 1:
            self._began, self._lines = now, 0
        self._lines += 1
        return self._lines <= LINES_PER_SECOND
