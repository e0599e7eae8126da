"""What is to be said to a request about load balancing, and what to be done: pure; JSON in and out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moe_serve.base.errors import ConfigError
from moe_serve.base.tables import EPLB_POLICIES
from moe_serve.eplb.placement_file import placement_from_document, placement_to_document
from moe_serve.eplb.questions import Requested, RequestQuestion, Situation
from moe_serve.eplb.rearrangement import Proposal
from moe_serve.eplb.search.scores import all_scores, mean_of_ratios

Propose = Callable[[Situation, str], Proposal]
Body = Mapping[str, Any]
Answered = tuple[Requested, list[bytes]]
UNDER_WAY = "a rearrangement is under way; wait until it is done (GET /eplb shows it)"
NO_WAY_BACK = "nothing to roll back to: no rearrangement has been applied"
NOT_RECORDED = "nothing has been recorded; POST /eplb/record/start, send some traffic, then dump"


def answer_request(question: RequestQuestion, propose: Propose) -> Answered:
    """Never raises for what is wrong with a request: that is its answer."""
    actions: Mapping[str, Callable[[RequestQuestion, Body, Propose], Answered]] = {
        "state": _state,
        "metrics": _metrics,
        "plan": _plan,
        "apply": _apply,
        "rollback": _rollback,
        "save": _save,
        "record/start": _record,
        "record/stop": _record,
        "record/dump": _dump,
    }
    action = actions.get(question.action)
    try:
        if action is None:
            raise ConfigError(f"unknown action {question.action[:50]!r}; known are: {', '.join(actions)}")
        return action(question, _parsed(question.body), propose)
    except ConfigError as error:
        return refused(400, str(error))


def refused(status: int, message: str) -> Answered:
    """In the shape of OpenAI's errors."""
    kinds = {400: ("invalid_request_error", None), 409: ("conflict", "conflict")}
    kind, code = kinds.get(status, ("service_unavailable", "unavailable"))
    error = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return Requested(status=status), [json.dumps(error).encode()]


def _state(question: RequestQuestion, _body: Body, _propose: Propose) -> Answered:
    situation, facts = question.situation, question.facts
    judged = facts.judged
    return _json(
        {
            "placement": placement_to_document(situation.served, situation.forecast.num_nodes),
            "epoch": facts.epoch,
            "in_flight": facts.in_flight,
            "window_steps": facts.window_steps,
            "window_load": situation.load_LE.astype(np.int64).tolist(),
            "balancedness": mean_of_ratios(situation.forecast.rank_loads(situation.load_LE, situation.served)),
            "predicted": None if judged is None else judged.balancedness_after,
            "judgement": None if judged is None else judged.document(),
            "history": facts.history,
            "recording": {"on": facts.recording, "steps": facts.recorded_steps},
        }
    )


def _metrics(question: RequestQuestion, _body: Body, _propose: Propose) -> Answered:
    situation = question.situation
    scores = all_scores(situation.forecast.rank_loads(situation.load_LE, situation.served))
    return _json({"balancedness": scores, **question.facts.totals})


def _plan(question: RequestQuestion, body: Body, propose: Propose) -> Answered:
    _only(body, "policy", "placement")
    return _json(_described(_wanted(question, body, propose), question.situation.forecast.num_nodes))


def _apply(question: RequestQuestion, body: Body, propose: Propose) -> Answered:
    _only(body, "policy", "placement")
    if question.facts.in_flight:
        return refused(409, UNDER_WAY)
    proposal = _wanted(question, body, propose)
    described = _described(proposal, question.situation.forecast.num_nodes)
    return _json(described, status=202, act="apply", proposal=proposal)


def _rollback(question: RequestQuestion, body: Body, _propose: Propose) -> Answered:
    _only(body)
    situation, previous = question.situation, question.facts.previous
    if question.facts.in_flight or previous is None:
        return refused(409, UNDER_WAY if question.facts.in_flight else NO_WAY_BACK)
    proposal = situation.forecast.plan(situation.load_LE, situation.served, previous, epoch=situation.epoch)
    return _json({"rolling_back_from": situation.epoch}, status=202, act="rollback", proposal=proposal)


def _save(question: RequestQuestion, body: Body, _propose: Propose) -> Answered:
    _only(body)
    return _json(placement_to_document(question.situation.served, question.situation.forecast.num_nodes))


def _record(question: RequestQuestion, body: Body, _propose: Propose) -> Answered:
    _only(body)
    if question.action == "record/start":
        return _json({"recording": True}, act=question.action)
    return _json({"recording": False, "steps": question.facts.recorded_steps}, act=question.action)


def _dump(question: RequestQuestion, body: Body, _propose: Propose) -> Answered:
    _only(body)
    if not question.facts.recorded_steps:
        return refused(409, NOT_RECORDED)
    return Requested(status=200, act=question.action), [b""]


def _wanted(question: RequestQuestion, body: Body, propose: Propose) -> Proposal:
    """The plan a request is about: a placement it brings, or what a policy would do."""
    situation = question.situation
    if "placement" in body:
        placed = situation.served
        placement = placement_from_document(
            body["placement"],
            "the placement",
            num_layers=placed.num_layers,
            num_experts=placed.num_logical,
            num_ranks=placed.num_ranks,
            num_redundant=placed.num_redundant,
        )
        return situation.forecast.plan(situation.load_LE, placed, placement, epoch=situation.epoch)
    name = body.get("policy")
    if name is None:
        return propose(situation, question.policy)
    if not isinstance(name, str):
        raise ConfigError(f"policy must be a name, not {json.dumps(name)[:100]}")
    EPLB_POLICIES.check(name)  # what comes from outside names no module
    return propose(situation, name)


def _described(plan: Proposal, num_nodes: int) -> dict[str, object]:
    return {
        "balancedness_before": plan.balancedness_before,
        "balancedness_after": plan.balancedness_after,
        "gain": plan.gain,
        "moved_experts": plan.num_moves,
        "moved_bytes": plan.num_bytes,
        "placement": placement_to_document(plan.placement, num_nodes),
    }


def _parsed(body: bytes) -> Body:
    try:
        values = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the body must be a JSON object, not {type(values).__name__}")
    return values


def _only(body: Body, *allowed: str) -> None:
    unknown = sorted(set(body) - set(allowed))
    if unknown:
        named = ", ".join(allowed) or "none"
        raise ConfigError(f"unknown fields: {', '.join(unknown)[:200]}; allowed are: {named}")


def _json(value: object, *, status: int = 200, act: str = "", proposal: Proposal | None = None) -> Answered:
    body = json.dumps(value, default=_plain).encode()
    return Requested(status=status, act=act, proposal=proposal), [body]


def _plain(value: object) -> object:
    """numpy's numbers as JSON's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} in an answer")
