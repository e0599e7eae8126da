"""How a launcher or a supervisor says that it has ended: exit codes, and pauses before what is started again. Pure."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from moe_serve.base.messages import Stop

MISTAKE = 2
"""Exit code of what the operator must change before it can be started again."""
WORLD_ENDED = 3
"""Exit code of a launcher whose own ranks were fine."""
PAUSE_SECONDS = 1.0
LONG_SECONDS = 60.0
"""A world that lasted so long did not end because of how it was started."""


def exit_code(stop: Stop, node: str, *, asked: bool) -> int:
    """Of the launcher `node`, which was `asked` to stop or not. WORLD_ENDED where another node ended the world, by
    its mistake too: whoever watches this process should start it again."""
    if stop.node in ("", node):
        return stop.code
    return 0 if asked and stop.code == 0 else WORLD_ENDED


def code_of_ranks(codes: Sequence[int], *, asked: bool) -> int:
    """Of a supervisor whose launchers ended with these (minus the signal that killed one): the worst of them.

    One that was stopped by itself ended the world on purpose, and the others' WORLD_ENDED says no more than that.
    """
    if MISTAKE in codes:
        return MISTAKE
    early = -signal.SIGTERM  # asked to stop before it could listen to that
    known = [0 if asked and code == early else code for code in codes]
    if any(code not in (0, WORLD_ENDED) for code in known):
        return 1
    if asked:
        return WORLD_ENDED if WORLD_ENDED in known else 0
    return 0 if 0 in known else WORLD_ENDED


@dataclass(slots=True)
class Pauses:
    """Between one world and the next: longer each time while worlds end soon."""

    seconds: float = PAUSE_SECONDS

    def after(self, lasted: float) -> float:
        """Seconds to wait after a world that lasted so many."""
        self.seconds = PAUSE_SECONDS if lasted > LONG_SECONDS else min(2 * self.seconds, LONG_SECONDS / 2)
        return self.seconds
