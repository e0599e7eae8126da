"""What is to be worked out for a Rebalancer, and what came of it: records, so that anybody may do the work anywhere.

A question holds everything that its answer depends on. Whoever solves one (eplb/solving.py says how) measures the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from moe_serve.base.parcel import Parcel
from moe_serve.eplb.forecast import Forecast
from moe_serve.eplb.gate import Judgement
from moe_serve.eplb.placement import Placement
from moe_serve.eplb.policies.base import Floats
from moe_serve.eplb.rearrangement import Proposal
from moe_serve.eplb.saving import WindowPart


@dataclass(frozen=True, slots=True)
class Situation:
    """What a plan is made from: the load float64 (L, E), what is served since `epoch`, and how it is judged.

    `parts` add up to the load, for whoever is to say what a plan saves.
    """

    epoch: int
    load_LE: Floats
    served: Placement
    forecast: Forecast
    num_groups: int
    seed: int
    parts: list[WindowPart] = field(default_factory=list)


class PlanQuestion(msgspec.Struct, frozen=True, kw_only=True, tag="plan"):
    """What would the policy of this name do? Answered with Planned."""

    number: int
    situation: Situation
    policy: str


class SharesQuestion(msgspec.Struct, frozen=True, kw_only=True, tag="shares"):
    """How is the load split over the copies of some layers? Answered with Ordered.

    `stage`: with StageExperts, which bring the placement of these layers; else with SetShares. `ranks_per_engine` says
    which engines are on which node.
    """

    number: int
    epoch: int
    load_LE: Floats
    placement: Placement
    forecast: Forecast
    layers: list[int]
    stage: bool
    ranks_per_engine: int
    generation: int = 1


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a request about load balancing may want to know beside the situation; `previous` is what to roll back to."""

    epoch: int
    in_flight: bool
    window_steps: int
    judged: Judgement | None
    history: list[dict[str, object]]
    totals: dict[str, object]
    recording: bool
    recorded_steps: int
    previous: Placement | None


class RequestQuestion(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """What is to be answered to a request, number `request` of `member`? Answered with Requested."""

    number: int
    member: int
    request: int
    action: str
    body: bytes
    policy: str
    situation: Situation
    facts: Facts


Question = PlanQuestion | SharesQuestion | RequestQuestion


class Planned(msgspec.Struct, frozen=True, tag="planned"):
    """What was asked for would be this."""

    proposal: Proposal


class Ordered(msgspec.Struct, frozen=True, tag="ordered"):
    """Orders, each an encoded record in `Solved.bodies`, for these engines."""

    engines: list[list[int]]


class Requested(msgspec.Struct, frozen=True, kw_only=True, tag="requested"):
    """The answer to a request; its body is that of `Solved.bodies`. First `act`, if the state still allows it."""

    status: int
    act: str = ""
    proposal: Proposal | None = None


class Unsolved(msgspec.Struct, frozen=True, tag="unsolved"):
    """There is no answer, for this reason."""

    reason: str


Result = Planned | Ordered | Requested | Unsolved


@dataclass(frozen=True, slots=True)
class Solved:
    """What came of a question, how long that took, and what is too large to be looked at on the way."""

    number: int
    seconds: float
    result: Result
    bodies: tuple[Parcel, ...] = ()
