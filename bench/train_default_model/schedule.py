"""Learning rate and window length as functions of the time spent, so that training ends on time whatever its speed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

TOKENS_PER_BATCH = 4096


@dataclass
class Schedule:
    """Warm-up, a plateau, and from `decay_from` (a share of the budget) a straight line down. Times in seconds."""

    budget_s: float
    spent_s: float = 0.0
    decay_from: float = 0.4
    warm_up: float = 0.01
    peak: float = 1.0

    @property
    def progress(self) -> float:
        return min(self.spent_s / self.budget_s, 1.0)

    def rate(self) -> float:
        """What to multiply the learning rates with."""
        left = (1 - self.progress) / (1 - self.decay_from)
        return self.peak * max(min(self.progress / self.warm_up, left, 1.0), 0.02)

    def finish_within(self, seconds: float) -> None:
        """Go down from the present rate to nothing within `seconds` from now."""
        self.peak, self.warm_up = self.rate(), 1e-9
        self.budget_s = self.spent_s + seconds
        self.decay_from = self.spent_s / self.budget_s

    def length(self, step: int) -> int:
        """Short windows first, then longer ones up to the whole context, so that all its places are learned."""
        if self.progress < 0.15:
            return 256
        if self.progress < 0.6:
            return (512, 512, 512, 1024)[step % 4]
        return (512, 1024, 512, 2048)[step % 4]

    def state(self) -> dict[str, float]:
        return asdict(self)


def minutes_asked(path: Path) -> float | None:
    """The number in the file with which an operator asks for an early end (`echo 10 > FOLDER/finish`); taken once."""
    try:
        text = path.read_text()
        path.unlink()
        return float(text.strip() or 5)
    except (FileNotFoundError, ValueError):
        return None
