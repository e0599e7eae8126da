"""A step between its plan and its booking: what is in the air, and what came of it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from moe_serve.base.commands import Reply, StepPlan, StepResult
from moe_serve.base.engine_messages import TokenEvent


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A plan that the workers were given. It ends once: by `EngineCore.end`, or by `EngineCore.revert`."""

    plan: StepPlan
    reply: Future[Reply]


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """`events` for the front-ends; `result` as the workers gave it."""

    events: list[TokenEvent]
    result: StepResult
