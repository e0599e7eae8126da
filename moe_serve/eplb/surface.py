"""What can be asked of load balancing: the answers behind /eplb and the metrics. Pure; JSON in and out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moe_serve.base.errors import ConfigError, Conflict
from moe_serve.base.tables import EPLB_POLICIES
from moe_serve.eplb.placement_file import placement_from_document, placement_to_document
from moe_serve.eplb.policies.base import Policy
from moe_serve.eplb.rearrangement import ForEngine, Proposal
from moe_serve.eplb.rebalancer import Rebalancer
from moe_serve.eplb.search.scores import all_scores, mean_of_ratios

Answer = tuple[int, bytes, list[ForEngine]]
OFF = "load balancing is off; start the server with --enable-eplb"
STARTING = "the engines are still starting"


class BalanceSurface:
    """`ask()` gives an HTTP status, a body, and orders to carry out.

    `rebalancer` None: balancing is off. Not `ready`: engines take no orders yet.
    """

    def __init__(self, rebalancer: Rebalancer | None, *, ready: bool = True) -> None:
        self._rebalancer = rebalancer
        self._ready = ready

    def ask(self, action: str, body: bytes, now: float) -> Answer:
        """Never raises: what is wrong with a request is its answer."""
        rebalancer = self._rebalancer
        actions: Mapping[str, Callable[[Rebalancer, Mapping[str, Any], float], Answer]] = {
            "state": self._state,
            "metrics": self._metrics,
            "plan": self._plan,
            "apply": self._apply,
            "rollback": self._rollback,
            "save": self._save,
            "record/start": self._record_start,
            "record/stop": self._record_stop,
            "record/dump": self._record_dump,
        }
        if rebalancer is None:
            return _refused(400, OFF)
        if not self._ready:
            return _refused(503, STARTING)
        try:
            return actions[action](rebalancer, _parsed(body), now)
        except Conflict as error:
            return _refused(409, str(error))
        except ConfigError as error:
            return _refused(400, str(error))

    def _state(self, rebalancer: Rebalancer, _body: Mapping[str, Any], _now: float) -> Answer:
        return _json(
            {
                "placement": placement_to_document(rebalancer.placement, rebalancer.num_nodes),
                "epoch": rebalancer.epoch,
                "in_flight": rebalancer.in_flight,
                "window_steps": rebalancer.window.num_steps,
                "window_load": rebalancer.window.load().sum(axis=1).tolist(),
                "balancedness": mean_of_ratios(rebalancer.rank_loads()),
                "predicted": rebalancer.last_prediction,
                "history": rebalancer.history,
                "recording": {"on": rebalancer.recording.on, "steps": len(rebalancer.recording.steps)},
            }
        )

    def _metrics(self, rebalancer: Rebalancer, _body: Mapping[str, Any], _now: float) -> Answer:
        loads_LR, totals = rebalancer.rank_loads(), rebalancer.totals
        return _json(
            {
                "balancedness": all_scores(loads_LR),
                "rebalances": totals.rebalances,
                "skipped": dict(totals.skipped),
                "moved_experts": totals.moved_experts,
                "moved_bytes": totals.moved_bytes,
                "stage_seconds": [len(totals.stage_seconds), sum(totals.stage_seconds)],
                "commit_seconds": [len(totals.commit_seconds), sum(totals.commit_seconds)],
                "last_success": totals.last_success,
            }
        )

    def _plan(self, rebalancer: Rebalancer, body: Mapping[str, Any], _now: float) -> Answer:
        _only(body, "policy", "placement")
        return _json(_described(_wanted(rebalancer, body), rebalancer.num_nodes))

    def _apply(self, rebalancer: Rebalancer, body: Mapping[str, Any], now: float) -> Answer:
        _only(body, "policy", "placement")
        if rebalancer.in_flight:
            raise Conflict("a rearrangement is under way; wait until it is done (GET /eplb shows it)")
        plan = _wanted(rebalancer, body)
        sends = rebalancer.apply(plan, now, why="request")
        return _json(_described(plan, rebalancer.num_nodes), sends, status=202)

    def _rollback(self, rebalancer: Rebalancer, body: Mapping[str, Any], now: float) -> Answer:
        _only(body)
        return _json({"rolling_back_from": rebalancer.epoch}, rebalancer.rollback(now), status=202)

    def _save(self, rebalancer: Rebalancer, body: Mapping[str, Any], _now: float) -> Answer:
        _only(body)
        return _json(placement_to_document(rebalancer.placement, rebalancer.num_nodes))

    def _record_start(self, rebalancer: Rebalancer, body: Mapping[str, Any], _now: float) -> Answer:
        _only(body)
        return _json({"recording": True}, rebalancer.record(True))

    def _record_stop(self, rebalancer: Rebalancer, body: Mapping[str, Any], _now: float) -> Answer:
        _only(body)
        return _json({"recording": False, "steps": len(rebalancer.recording.steps)}, rebalancer.record(False))

    def _record_dump(self, rebalancer: Rebalancer, body: Mapping[str, Any], _now: float) -> Answer:
        _only(body)
        if not rebalancer.recording.steps:
            raise Conflict("nothing has been recorded; POST /eplb/record/start, send some traffic, then dump")
        metadata = {"steps": str(len(rebalancer.recording.steps)), "made_by": "moe-serve"}
        return 200, rebalancer.recording.dump(metadata), []


def _wanted(rebalancer: Rebalancer, body: Mapping[str, Any]) -> Proposal:
    """The plan a request is about: a placement it brings, or what a policy would do."""
    if "placement" in body:
        placed = rebalancer.placement
        placement = placement_from_document(
            body["placement"],
            "the placement",
            num_layers=placed.num_layers,
            num_experts=placed.num_logical,
            num_ranks=placed.num_ranks,
            num_redundant=placed.num_redundant,
        )
        return rebalancer.predict(placement)
    name = body.get("policy")
    if name is None:
        return rebalancer.propose()
    if not isinstance(name, str):
        raise ConfigError(f"policy must be a name, not {json.dumps(name)[:100]}")
    policy: Policy = EPLB_POLICIES.load(name)  # type: ignore[assignment]
    return rebalancer.propose(policy)


def _described(plan: Proposal, num_nodes: int) -> dict[str, object]:
    return {
        "balancedness_before": plan.balancedness_before,
        "balancedness_after": plan.balancedness_after,
        "gain": plan.gain,
        "moved_experts": plan.num_moves,
        "moved_bytes": plan.num_bytes,
        "placement": placement_to_document(plan.placement, num_nodes),
    }


def _parsed(body: bytes) -> Mapping[str, Any]:
    try:
        values = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the body must be a JSON object, not {type(values).__name__}")
    return values


def _only(body: Mapping[str, Any], *allowed: str) -> None:
    unknown = sorted(set(body) - set(allowed))
    if unknown:
        named = ", ".join(allowed) or "none"
        raise ConfigError(f"unknown fields: {', '.join(unknown)[:200]}; allowed are: {named}")


def _json(value: object, sends: list[ForEngine] | None = None, *, status: int = 200) -> Answer:
    return status, json.dumps(value, default=_plain).encode(), sends or []


def _plain(value: object) -> object:
    """numpy's numbers as JSON's."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} in an answer")


def _refused(status: int, message: str) -> Answer:
    """In the shape of OpenAI's errors."""
    kinds = {400: ("invalid_request_error", None), 409: ("conflict", "conflict")}
    kind, code = kinds.get(status, ("service_unavailable", "unavailable"))
    return status, json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode(), []
