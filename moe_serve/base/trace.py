"""What a rank does in its steps, as a Chrome trace: for chrome://tracing or ui.perfetto.dev.

Format: the array form of Google's "Trace Event Format", whose end may be missing, so that a process which is ended in
the middle leaves a good file: complete events ("X") on named threads, times in microseconds.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

MOST_SPANS = 500_000
"""About 60 MB; what comes after is not kept."""
log = logging.getLogger(__name__)


class ChromeTrace:
    """Spans of one rank, which is a process of the trace; each `track` a thread of it.

    Clocks of ranks on one machine are the same. Where the file cannot be written there is one warning, and no trace:
    nobody's answer depends on it.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path.with_name(f"{path.stem}.rank{rank}{path.suffix or '.json'}")
        self.rank = rank
        self._lines = [_named("process_name", rank, 0, f"rank {rank}")]
        self._tracks: dict[str, int] = {}
        self._num_spans = 0
        self._is_open = True
        self._put("w", "[\n")

    def add(self, name: str, track: str, started: float, *, step: int, layer: int) -> None:
        """From `started` of time.perf_counter() until now."""
        now = time.perf_counter()
        self._num_spans += 1
        if not self._is_open or self._num_spans > MOST_SPANS:
            return
        if track not in self._tracks:
            self._tracks[track] = len(self._tracks)
            self._lines.append(_named("thread_name", self.rank, self._tracks[track], track))
        span = {
            "name": name,
            "ph": "X",
            "pid": self.rank,
            "tid": self._tracks[track],
            "ts": round(1e6 * started, 1),
            "dur": round(1e6 * (now - started), 1),
            "args": {"step": step, "layer": layer},
        }
        self._lines.append(json.dumps(span))
        if self._num_spans == MOST_SPANS:
            log.warning("%s has %d spans, later ones are not kept", self.path, MOST_SPANS)

    def flush(self) -> None:
        """Between two steps: what was added since the last time goes to the file."""
        if self._lines and self._is_open:
            self._put("a", "".join(f"{line},\n" for line in self._lines))
            self._lines.clear()

    def _put(self, mode: str, text: str) -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            self._is_open = False
            log.warning("the trace cannot be written: %s", error)


def _named(what: str, process: int, thread: int, name: str) -> str:
    return json.dumps({"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}})
