"""Answers to the questions of a Rebalancer and of requests: pure functions; whoever calls them has the time for it."""

from __future__ import annotations

from typing import cast

import msgspec
import numpy as np

from moe_serve.base.commands import SetShares, StageExperts
from moe_serve.base.errors import ConfigError
from moe_serve.base.registry import import_target
from moe_serve.base.tables import EPLB_POLICIES
from moe_serve.eplb.answers import answer_request
from moe_serve.eplb.forecast import check_alike
from moe_serve.eplb.nodes import nodes_of_ranks
from moe_serve.eplb.placement import Placement
from moe_serve.eplb.policies.base import Policy, Problem
from moe_serve.eplb.questions import (
    Ordered,
    Planned,
    PlanQuestion,
    Question,
    RequestQuestion,
    Result,
    SharesQuestion,
    Situation,
    Unsolved,
)
from moe_serve.eplb.rearrangement import Proposal
from moe_serve.eplb.shares import table_of_node

Answer = tuple[Result, list[bytes]]


def solve(question: Question) -> Answer:
    """The result and its bodies. Never raises: whatever goes wrong is the reason why there is none."""
    try:
        match question:
            case PlanQuestion():
                return Planned(propose(question.situation, question.policy)), []
            case SharesQuestion():
                return _orders(question)
            case RequestQuestion():
                return answer_request(question, propose)
    except ConfigError as error:
        return Unsolved(str(error)), []
    except Exception as error:  # noqa: BLE001 (who asked goes on without)
        return Unsolved(f"{type(error).__name__}: {error}"), []


def propose(situation: Situation, policy: str) -> Proposal:
    """What the policy would do now. ConfigError without any load, and for a policy that does not work.

    A policy is a name of EPLB_POLICIES, or "package.module:function".
    """
    problem = Problem(
        situation.load_LE,
        situation.served.offsets,
        situation.forecast.node_sizes,
        situation.num_groups,
        situation.served,
        seed=situation.seed,
    )
    try:
        placement = _checked(_load(policy)(problem), situation.served)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a policy may be anybody's
        raise ConfigError(f"the policy failed: {type(error).__name__}: {error}") from error
    return predict(situation, placement)


def predict(situation: Situation, placement: Placement) -> Proposal:
    """What a placement would bring; ConfigError if it is of another model or world."""
    return situation.forecast.plan(
        situation.load_LE, situation.served, placement, epoch=situation.epoch, parts=situation.parts
    )


def _load(policy: str) -> Policy:
    found = import_target(policy, "EPLB policy", policy) if ":" in policy else EPLB_POLICIES.load(policy)
    return cast(Policy, found)


def _checked(answer: object, served: Placement) -> Placement:
    """A policy's answer as a placement of this world."""
    if not isinstance(answer, Placement):
        raise ConfigError(f"the policy failed: it must return a Placement, not {type(answer).__name__}")
    table = answer.physical_to_logical_LP
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.dtype.kind not in "iu":
        raise ConfigError("the policy failed: physical_to_logical_LP must be an array of whole numbers [layers, slots]")
    whole = Placement(np.ascontiguousarray(table, dtype=np.int64), tuple(map(int, answer.offsets)), answer.num_logical)
    check_alike(served, whole)
    whole.check()
    return whole


def _orders(question: SharesQuestion) -> Answer:
    """One order for all engines whose ranks are on the same nodes."""
    split = question.forecast.split(question.load_LE[question.layers], question.placement.of_layers(question.layers))
    nodes = nodes_of_ranks(question.forecast.node_sizes or (question.placement.num_ranks,))
    engines: dict[tuple[int, ...], list[int]] = {}
    for dp, ranks in enumerate(nodes.reshape(-1, question.ranks_per_engine)):
        engines.setdefault(tuple(np.unique(ranks).tolist()), []).append(dp)
    tables = {node: table_of_node(split, node).tobytes() for node in {n for key in engines for n in key}}
    encode = msgspec.msgpack.Encoder().encode
    bodies = [encode(_order(question, {node: tables[node] for node in key})) for key in engines]
    return Ordered(list(engines.values())), bodies


def _order(question: SharesQuestion, shares: dict[int, bytes]) -> StageExperts | SetShares:
    forecast = question.forecast
    if not question.stage:
        return SetShares(
            epoch=question.epoch, shares=shares, node_sizes=forecast.node_sizes, local_first=forecast.prefer_local
        )
    table_LP = question.placement.physical_to_logical_LP
    return StageExperts(
        epoch=question.epoch,
        rows={layer: table_LP[layer].tolist() for layer in question.layers},
        shares=shares,
        node_sizes=forecast.node_sizes,
        local_first=forecast.prefer_local,
        generation=question.generation,
    )
