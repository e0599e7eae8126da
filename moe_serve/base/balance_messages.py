"""Records about load balancing between engines or front-ends and the coordinator; parts of FromMember and ToMember."""

from __future__ import annotations

from typing import Literal

import msgspec

StageState = Literal["moving", "staged", "committed", "dropped", "failed"]


class StageReport(msgspec.Struct, frozen=True, kw_only=True, tag="stage_report"):
    """An engine's news of a rearrangement. Seconds and bytes are this engine's own; `reason` where it failed.

    "moving" is a heartbeat: it is not staged yet, but weights have arrived since the last one.
    """

    epoch: int
    state: StageState
    reason: str = ""
    stage_seconds: float = 0.0
    commit_seconds: float = 0.0
    busy_seconds: float = 0.0
    """Spent between steps on moving, but for the commit."""
    bytes_received: int = 0
    generation: int = 1


class StepLoad(msgspec.Struct, frozen=True, kw_only=True, tag="step_load"):
    """From engine 0: `load` of all ranks over the last `steps` steps, int64 (layers, 2, experts) as bytes.

    `step_seconds` what the steps took engine 0, without the time between them; 0 if not known. `expert_seconds[rank]`
    what the rank's experts took in them, all layers together; empty if nobody can tell.
    """

    step: int
    steps: int
    load: bytes
    step_seconds: float = 0.0
    expert_seconds: list[float] = []


class DropStage(msgspec.Struct, frozen=True, tag="drop_stage"):
    """Give the stage of this epoch up."""

    epoch: int


class Record(msgspec.Struct, frozen=True, tag="record"):
    """Collect the load of every step from now on, or no longer."""

    on: bool


class BalanceAsk(msgspec.Struct, frozen=True, kw_only=True, tag="balance_ask"):
    """A front-end passes on a request about load balancing. `body` JSON."""

    number: int
    action: str
    body: bytes = b""


class BalanceAnswer(msgspec.Struct, frozen=True, kw_only=True, tag="balance_answer"):
    """What became of it: an HTTP status, and a body (JSON, or a file where one was asked for)."""

    number: int
    status: int
    body: bytes
