"""When somebody should look: alerts for Prometheus, made of the metrics in base/metrics.py."""

from __future__ import annotations

from typing import Literal

from moe_serve.base import metrics as table
from moe_serve.deploy.deployment import Deployment
from moe_serve.deploy.manifest import Manifest
from moe_serve.deploy.scraping import RANK, WORLD
from moe_serve.deploy.series import rate, series, value

LOW_BALANCEDNESS = 0.7
MAX_WAIT_DIFFERENCE = 0.25
"""Share of the time that one rank waits longer for the others' votes than another: that one is slower."""
MAX_LOAD_RATIO = 3
FEW_REQUESTS = 16
STUCK_OVER = "1h"
STUCK_INTERVALS = 2


def prometheus_rule(deployment: Deployment) -> Manifest:
    """Those of a balancer only where there is one, those that compare ranks only where there are several."""
    rules = [_missing(deployment), _overloaded(deployment)]
    if deployment.num_ranks > 1:
        rules += [_rank_skew(deployment), _load_skew(deployment)]
    if deployment.config.parallel.enable_eplb:
        rules += [_unbalanced(deployment), _stuck(deployment)]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": deployment.metadata(deployment.name),
        "spec": {"groups": [{"name": f"moe-serve-{deployment.name}", "rules": rules}]},
    }


def _missing(deployment: Deployment) -> Manifest:
    up = f"up{_selector(deployment)}"
    return _alert(
        "MoEServeRanksMissing",
        f"sum by (namespace) ({up}) < {deployment.num_ranks} or absent({up})",
        wait="5m",
        severity="critical",
        summary=f"fewer than {deployment.num_ranks} ranks of {deployment.name} answer: the whole world waits for them",
    )


def _overloaded(deployment: Deployment) -> Manifest:
    refused = value(table.REQUESTS_REFUSED, _selector(deployment, 'reason=~"queued_.*"'))
    return _alert(
        "MoEServeOverloaded",
        f"sum by (namespace) (rate({refused}[5m])) > 0",
        wait="10m",
        severity="warning",
        summary=f"{deployment.name} refuses requests with 503, since too many wait already",
    )


def _rank_skew(deployment: Deployment) -> Manifest:
    waiting = _of_each_rank(rate(table.DP_VOTE_SECONDS, _selector(deployment), "5m"))
    return _alert(
        "MoEServeRankSkew",
        f"max by (namespace) ({waiting}) - min by (namespace) ({waiting}) > {MAX_WAIT_DIFFERENCE}",
        wait="10m",
        severity="warning",
        summary=f"one rank of {deployment.name} is slower than the others, which wait for it in each step",
    )


def _load_skew(deployment: Deployment) -> Manifest:
    running = value(table.NUM_REQUESTS_RUNNING, _selector(deployment))
    load = _of_each_rank(f"{running} + {value(table.NUM_REQUESTS_WAITING, _selector(deployment))}")
    return _alert(
        "MoEServeLoadSkew",
        f"max by (namespace) ({load}) > {MAX_LOAD_RATIO} * avg by (namespace) ({load}) "
        f"and max by (namespace) ({load}) > {FEW_REQUESTS}",
        wait="10m",
        severity="warning",
        summary=f"the load balancer in front of {deployment.name} sends one rank far more than the others",
    )


def _unbalanced(deployment: Deployment) -> Manifest:
    return _alert(
        "MoEServeExpertsUnbalanced",
        _is_unbalanced(deployment),
        wait="10m",
        severity="warning",
        summary=f"the busiest rank's experts get far more than their share in {deployment.name}",
    )


def _stuck(deployment: Deployment) -> Manifest:
    """Two intervals of steps went by, and nothing was moved although it should."""
    selector = _selector(deployment)
    moved = f"max by (namespace) (increase({series(table.EPLB_REBALANCES)[0]}{selector}[{STUCK_OVER}]))"
    steps = f"max by (namespace) (increase({series(table.STEPS)[0]}{selector}[{STUCK_OVER}]))"
    due = STUCK_INTERVALS * deployment.config.parallel.eplb_config.step_interval
    return _alert(
        "MoEServeRebalanceStuck",
        f"{_is_unbalanced(deployment)} and {moved} == 0 and {steps} > {due}",
        wait="10m",
        severity="warning",
        summary=f"{deployment.name} is unbalanced, and no rearrangement of experts was applied for {STUCK_OVER}",
    )


def _is_unbalanced(deployment: Deployment) -> str:
    """Every rank tells the same figure."""
    return f"max by (namespace) ({value(table.EPLB_BALANCEDNESS, _selector(deployment))}) < {LOW_BALANCEDNESS}"


def _of_each_rank(expression: str) -> str:
    """One figure for each rank, however many servers speak for it."""
    return f"sum by (namespace, {RANK}) ({expression})"


def _selector(deployment: Deployment, *more: str) -> str:
    namespace = [f'namespace="{deployment.options.namespace}"'] if deployment.options.namespace else []
    return "{" + ",".join([f'{WORLD}="{deployment.name}"', *namespace, *more]) + "}"


def _alert(
    name: str, expression: str, *, wait: str, severity: Literal["warning", "critical"], summary: str
) -> Manifest:
    return {
        "alert": name,
        "expr": expression,
        "for": wait,
        "labels": {"severity": severity},
        "annotations": {"summary": summary},
    }
