"""The one thing that a Rebalancer wants to know, and answers that nobody waits for any more. Pure."""

from __future__ import annotations

import itertools

from moe_serve.eplb.questions import PlanQuestion, SharesQuestion, Solved

Asked = PlanQuestion | SharesQuestion


class Inquiry:
    """At most one question is open, so nothing is decided twice."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._open: Asked | None = None
        self._to_give: list[Asked] = []
        self._outdated: dict[int, str] = {}

    @property
    def is_open(self) -> bool:
        return self._open is not None

    def next_number(self) -> int:
        """For one more question, also of others."""
        return next(self._numbers)

    def ask(self, question: Asked) -> None:
        """Open a question."""
        assert self._open is None, "one after the other"
        self._open = question
        self._to_give.append(question)

    def forget(self, why: str) -> Asked | None:
        """Nobody waits any more for what is open, which is returned."""
        forgotten, self._open = self._open, None
        if forgotten is not None:
            what = "a plan" if isinstance(forgotten, PlanQuestion) else "shares of copies"
            self._outdated[forgotten.number] = f"{what}: {why}"
        return forgotten

    def take(self) -> list[Asked]:
        """What somebody should work out, each given once."""
        questions, self._to_give = self._to_give, []
        return questions

    def close(self, solved: Solved) -> Asked | str:
        """The question that this answers, or why the answer is of no use."""
        if self._open is None or self._open.number != solved.number:
            return self._outdated.pop(solved.number, "nobody asked for it")
        closed, self._open = self._open, None
        return closed
