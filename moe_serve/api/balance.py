"""How the routes under /eplb reach the coordinator, which balances the load: a question over the link, an answer."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Protocol

from moe_serve.base.balance_messages import BalanceAnswer, BalanceAsk
from moe_serve.base.errors import EngineDead

ANSWER_SECONDS = 20.0


class Balance(Protocol):
    async def ask(self, action: str, body: bytes = b"") -> tuple[int, bytes]:
        """An HTTP status and a body. EngineDead if the coordinator does not answer in time."""
        ...


class CoordinatorBalance:
    """`send` puts a question on the link; whoever reads the link gives answers to `hear`, in the loop's thread."""

    def __init__(self) -> None:
        self.send: Callable[[BalanceAsk], None] | None = None
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[BalanceAnswer]] = {}

    async def ask(self, action: str, body: bytes = b"") -> tuple[int, bytes]:
        """See Balance."""
        if self.send is None:
            raise EngineDead("the coordinator is not connected yet")
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self.send(BalanceAsk(number=number, action=action, body=body))
            answer = await asyncio.wait_for(self._waiting[number], ANSWER_SECONDS)
        except TimeoutError as error:
            raise EngineDead(f"the coordinator gave no answer about load balancing in {ANSWER_SECONDS:g} s") from error
        finally:
            del self._waiting[number]
        return answer.status, answer.body

    def hear(self, answer: BalanceAnswer) -> None:
        """An answer arrived; one that nobody waits for any more is dropped."""
        waiting = self._waiting.get(answer.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)
