"""Where a rank is right now: one mutable note that the computing thread writes and the heartbeat thread reads."""

from __future__ import annotations

import enum
import time


class Phase(enum.Enum):
    """All that a rank can be doing. `waits_for_others`: it stands still as long as another rank does not come.

    Who is to blame for a slow step is decided by this alone (world/members.py): somebody who waits is not.
    """

    STARTING = "starting"
    FIND_STORE = "wait for rank 0's store"
    MEET_ENGINES = "meet the other engines"
    START_WORKERS = "start the workers"
    MEET_RANKS = "meet the other ranks"
    BUILD = "build model"
    AWAIT_READERS = "wait for others to load weights"
    LOAD = "load weights"
    MEASURE = "measure memory"
    ALLOCATE = "allocate KV cache"
    ASLEEP = "asleep"
    VOTE = "vote"
    STEP = "step"
    REPLY = "wait for the workers' reply"
    PREPARE = "prepare"
    EMBEDDING = "embedding"
    ATTENTION = "attention"
    DENSE = "dense"
    EXPERTS = "experts"
    RECEIVE_HIDDEN = "wait for the stage before"
    SEND_HIDDEN = "wait for the stage behind"
    DISPATCH = "dispatch"
    COMBINE = "combine"
    TENSOR_PARALLEL = "tensor-parallel exchange"
    LOGITS = "logits"
    SAMPLE = "sample"
    COLLECT_LOAD = "collect load"

    @property
    def waits_for_others(self) -> bool:
        return self in _WAITING

    @property
    def rests(self) -> bool:
        """Nothing to do: it may last for ever."""
        return self is Phase.ASLEEP

    def describe(self, layer: int) -> str:
        """For people; `layer` is only said where it means something."""
        return f"layer {layer} {self.value}" if self in _IN_LAYER else self.value


_WAITING = frozenset(
    {
        *(Phase.FIND_STORE, Phase.MEET_ENGINES, Phase.MEET_RANKS, Phase.AWAIT_READERS, Phase.VOTE, Phase.REPLY),
        *(Phase.DISPATCH, Phase.COMBINE, Phase.TENSOR_PARALLEL, Phase.COLLECT_LOAD),
        *(Phase.RECEIVE_HIDDEN, Phase.SEND_HIDDEN),
    }
)
_IN_LAYER = frozenset({Phase.ATTENTION, Phase.DENSE, Phase.EXPERTS, Phase.DISPATCH, Phase.COMBINE})


class Progress:
    """`enter()` is called on the token path: a few attribute stores and a clock read, no lock.

    `unfinished` requests of an engine, as of its last turn.
    """

    __slots__ = ("layer", "phase", "since", "step", "unfinished")

    def __init__(self) -> None:
        self.step = 0
        self.phase = Phase.STARTING
        self.layer = 0
        self.unfinished = 0
        self.since = time.monotonic()

    def enter(self, phase: Phase, *, step: int | None = None, layer: int | None = None) -> None:
        """Note that the rank is now in `phase`; of `step` and `layer` where these have changed."""
        if step is not None:
            self.step = step
        if layer is not None:
            self.layer = layer
        self.phase = phase
        self.since = time.monotonic()

    @property
    def place(self) -> str:
        """The phase, for people."""
        return self.phase.describe(self.layer)

    def seconds(self) -> float:
        """Seconds since the last enter()."""
        return time.monotonic() - self.since
