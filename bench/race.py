"""Contestants of one model take turns. Who fails is reported and left out; who waits must be at rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from bench.contestants import Contestant, ContestantEnded

REST_WINDOW_SECONDS = 0.1
REST_CORES = 0.15
"""Whose processes used fewer in a window is at rest. The kernel counts in hundredths of a second."""
REST_SECONDS = 5.0
"""At most so long is waited for rest. vLLM's engine polls for one second after an answer, idle OpenMP threads less."""
SHORT_PROMPT, SHORT_ANSWER = [1] * 8, 2
console = Console(stderr=True)


class Race:
    """`left_out` gets why a contestant is not in it, by name, and keeps what it has.

    Without `essential`, the contestant that the others are compared with, the benchmark ends.
    """

    def __init__(self, essential: str, left_out: dict[str, str]) -> None:
        self._essential, self._left_out = essential, left_out
        self.running: dict[str, Contestant] = {}
        self.waited: dict[str, tuple[float, float]] = {}
        """Seconds that a contestant used on cores while others had their turns, and how long these took."""

    def __enter__(self) -> Race:
        return self

    def __exit__(self, *_: object) -> None:
        for contestant in self.running.values():
            contestant.close()

    @property
    def names(self) -> list[str]:
        return list(self.running)

    def start(self, name: str, begin: Callable[[], Contestant]) -> float | None:
        """Seconds until it has answered a short prompt; None if it does not."""
        started = time.perf_counter()
        try:
            self.running[name] = begin()
        except ContestantEnded as ended:
            self.leave_out(name, str(ended))
            return None
        answered = self._ask(name, [SHORT_PROMPT], SHORT_ANSWER)
        return None if answered is None else round(time.perf_counter() - started, 1)

    def turn(self, name: str, prompts: list[list[int]], output_len: int) -> Any:
        """{"seconds", "answers"}, or None where it fails."""
        others = {other: contestant for other, contestant in self.running.items() if other != name}
        self._let_rest(list(others.values()))
        before = {other: contestant.cpu_seconds() for other, contestant in others.items()}
        started = time.perf_counter()
        given = self._ask(name, prompts, output_len)
        seconds = time.perf_counter() - started
        for other, contestant in others.items():
            used, waited = self.waited.get(other, (0.0, 0.0))
            self.waited[other] = (used + contestant.cpu_seconds() - before[other], waited + seconds)
        return given

    def leave_out(self, name: str, why: str) -> None:
        if name == self._essential:
            raise SystemExit(f"{name}: {why}")
        self._left_out[name] = why
        console.print(f"{name} is left out: {why}", soft_wrap=True, markup=False)

    def _ask(self, name: str, prompts: list[list[int]], output_len: int) -> Any:
        try:
            given = self.running[name].ask(prompts=prompts, output_len=output_len)
            if any(len(answer) != output_len for answer in given["answers"]) or len(given["answers"]) != len(prompts):
                raise ContestantEnded(f"an answer does not have {output_len} tokens")
        except ContestantEnded as ended:
            self.running.pop(name).kill()
            self.leave_out(name, str(ended))
            return None
        return given

    def _let_rest(self, contestants: Sequence[Contestant]) -> None:
        deadline = time.monotonic() + REST_SECONDS
        while time.monotonic() < deadline:
            before = sum(each.cpu_seconds() for each in contestants)
            time.sleep(REST_WINDOW_SECONDS)
            used = sum(each.cpu_seconds() for each in contestants) - before
            if used < REST_CORES * REST_WINDOW_SECONDS:
                return
