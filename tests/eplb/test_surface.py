"""What /eplb answers: state, figures, plans, and a refusal in one sentence for everything else."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from moe_serve.base.balance_messages import BalanceAsk
from moe_serve.eplb.questions import Solved, Unsolved
from moe_serve.eplb.rearrangement import Order
from moe_serve.eplb.surface import MAX_WAITING, BalanceSurface
from tests.support.balancing import EXPERTS, LAYERS, UNIX_TIME, Balanced, skewed, solved, stages

ACTIONS = ("state", "metrics", "plan", "apply", "rollback", "save", "record/start", "record/stop", "record/dump")


class Asked:
    """A surface over a rebalancer that has seen some load."""

    def __init__(self, *, loaded: bool = True, **options: Any) -> None:
        self.balanced = Balanced(**options)
        self.surface = BalanceSurface(self.balanced.rebalancer)
        if loaded:
            self.balanced.load(steps=10)

    def ask(self, action: str, body: object = None) -> tuple[int, Any, list[Order]]:
        raw = b"" if body is None else json.dumps(body).encode()
        status, answer, orders = self.whole(action, raw)
        return status, json.loads(answer), orders

    def whole(self, action: str, raw: bytes) -> tuple[int, bytes, list[Order]]:
        """The answer once what it needs is worked out, and all orders that follow."""
        given = self.surface.ask(5, BalanceAsk(number=9, action=action, body=raw))
        if given is None:
            (question,) = self.surface.take_questions()
            asker, given = self.surface.conclude(solved(question), self.balanced.now)
            assert (asker.member, asker.request) == (5, 9)
        status, body, orders = given
        return status, body.join(), self.balanced.settled(orders)

    def refusal(self, action: str, body: object = None) -> tuple[int, str]:
        status, answer, orders = self.ask(action, body)
        assert not orders, "a refusal orders nothing"
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return status, answer["error"]["message"]


def test_the_state_shows_placement_load_and_history() -> None:
    asked = Asked()
    status, state, _ = asked.ask("state")
    assert status == 200
    assert set(state) >= {"placement", "epoch", "window_load", "balancedness", "predicted", "history"}
    assert state["placement"]["physical_to_logical"] == asked.balanced.table
    assert np.array(state["window_load"]).tolist() == skewed().sum(axis=1).tolist()
    assert state["window_steps"] == 10
    assert (state["epoch"], state["in_flight"], state["predicted"]) == (0, False, None)
    assert 0 < state["balancedness"] < 1


def test_a_fresh_server_answers_too() -> None:
    _, state, _ = Asked(loaded=False).ask("state")
    assert (state["balancedness"], state["window_steps"]) == (1.0, 0)


def test_the_figures_count_what_was_applied_and_what_was_not() -> None:
    asked = Asked(step_interval=1000)
    asked.balanced.finish(asked.balanced.begin())
    failing = asked.balanced.begin()
    asked.balanced.report(0, "failed", failing[0].epoch)
    asked.balanced.all_report("dropped", failing[0].epoch)
    _, figures, _ = asked.ask("metrics")
    assert set(figures["balancedness"]) >= {"ratio_of_sums", "mean_of_ratios", "mean_excess", "peak_to_average_p95"}
    assert figures["rebalances"] == 1
    assert figures["skipped"] == {"stage_failed": 1}
    assert figures["moved_experts"] > 0
    assert figures["moved_bytes"] == 600
    assert (figures["stage_seconds"], figures["commit_seconds"]) == ([1, 2.0], [1, 0.25])
    assert figures["last_success"] == UNIX_TIME


def test_a_plan_is_a_dry_run_whose_placement_can_be_applied() -> None:
    asked = Asked()
    before = asked.balanced.table
    status, plan, orders = asked.ask("plan", {"policy": "deepseek"})
    assert (status, orders) == (200, [])
    assert plan["moved_experts"] * 1000 == plan["moved_bytes"] > 0
    assert not asked.balanced.rebalancer.in_flight
    status, applied, orders = asked.ask("apply", {"placement": plan["placement"]})
    assert status == 202
    assert applied == plan
    asked.balanced.finish(stages(orders))
    assert asked.balanced.table == plan["placement"]["physical_to_logical"] != before
    assert asked.ask("save")[1] == plan["placement"]


def test_apply_and_rollback_are_conflicts_while_a_rearrangement_is_under_way() -> None:
    asked = Asked()
    assert asked.refusal("rollback") == (409, "nothing to roll back to: no rearrangement has been applied")
    _, _, orders = asked.ask("apply")
    for action in ("apply", "rollback"):
        status, message = asked.refusal(action)
        assert status == 409
        assert "under way" in message
    assert asked.ask("plan")[0] == 200, "a dry run disturbs nobody"
    asked.balanced.finish(stages(orders))
    status, answer, orders = asked.ask("rollback")
    assert (status, answer["rolling_back_from"]) == (202, 1)
    assert stages(orders)


def test_a_recording_is_started_stopped_and_dumped() -> None:
    asked = Asked(step_interval=1000)
    assert asked.refusal("record/dump")[0] == 409
    status, _, orders = asked.ask("record/start")
    assert (status, len(orders)) == (200, 2)
    asked.balanced.load(skewed(4))
    assert asked.ask("state")[1]["recording"] == {"on": True, "steps": 1}
    assert asked.ask("record/stop")[1] == {"recording": False, "steps": 1}
    asked.balanced.load(skewed(5))
    status, dump, _ = asked.whole("record/dump", b"")
    assert status == 200
    assert load(dump)["logical_count"].tolist() == [skewed(4).sum(axis=1).tolist()]


def document(**changes: object) -> dict[str, object]:
    """A placement that would do, unless changed."""
    rows = [[*range(EXPERTS - 1, -1, -1), 0, 1]] * LAYERS
    values = {"num_ranks": 2, "num_nodes": 1, "physical_to_logical": rows, "rank_of_slot": [0] * 5 + [1] * 5}
    return values | changes


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        ({"num_ranks": 2}, "lacks physical_to_logical, rank_of_slot"),
        ([1, 2], "must hold an object"),
        (document(num_ranks=4), "is for 4 ranks, but this world spreads experts over 2"),
        (document(physical_to_logical=[[*range(8), 0, 1]] * 2), "has 2 layers, but this model has 3"),
        (document(physical_to_logical=[[*range(1, 8), 1, 2, 3]] * 3), "holds no copy of experts [0]"),
        (document(physical_to_logical=[[*range(9), 0]] * 3), "holds expert 8, but this model's experts are 0 to 7"),
        (document(physical_to_logical=[list(range(8))] * 3, rank_of_slot=[0] * 4 + [1] * 4), "num_redundant_experts"),
        (document(rank_of_slot=[0] * 4 + [1] * 6), "another model or world"),
        (document(physical_to_logical=[[0.5] * 10] * 3), "whole numbers"),
        (document(physical_to_logical=[[1 << 70] * 10] * 3), "whole numbers"),
        (document(rank_of_slot=[0] * 9 + [7]), "names rank 7"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused_in_one_sentence(placement: object, words: str) -> None:
    for action in ("plan", "apply"):
        status, message = Asked().refusal(action, {"placement": placement})
        assert status == 400
        assert words in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("action", "body", "words"),
    [
        ("plan", {"policy": "no-such"}, "unknown EPLB policy 'no-such'; known are: sticky, deepseek"),
        ("apply", {"policy": "static"}, "nothing to do"),
        ("apply", {"policy": ["sticky"]}, "policy must be a name"),
        ("save", {"path": "/etc/passwd"}, "unknown fields: path; allowed are: none"),
        ("record/dump", {"folder": "/tmp"}, "unknown fields: folder"),
        ("plan", {"polcy": "sticky"}, "unknown fields: polcy; allowed are: policy, placement"),
        ("plan", [1], "must be a JSON object, not list"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_sentence(action: str, body: object, words: str) -> None:
    status, message = Asked().refusal(action, body)
    assert status == 400
    assert words in message


def test_without_load_there_is_nothing_to_plan() -> None:
    status, message = Asked(loaded=False).refusal("plan")
    assert status == 400
    assert "nothing was recorded" in message


@pytest.mark.parametrize("action", ACTIONS)
def test_balancing_that_is_off_or_not_ready_says_so(action: str) -> None:
    asked = BalanceAsk(number=1, action=action)
    off = BalanceSurface(None).ask(5, asked)
    assert off is not None
    status, answer, orders = off
    assert (status, orders) == (400, [])
    assert b"--enable-eplb" in answer.join()
    starting = BalanceSurface(Balanced().rebalancer).ask(5, asked, ready=False)
    assert starting is not None
    status, answer, orders = starting
    assert (status, orders) == (503, [])
    assert b"still starting" in answer.join()


json_values: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*document(), "x"]), inner, max_size=4),
    max_leaves=12,
)
bodies = st.binary(max_size=30) | st.builds(
    lambda value: json.dumps(value).encode(),
    json_values | st.dictionaries(st.sampled_from(["policy", "placement", "x"]), json_values, max_size=3),
)


@settings(deadline=None)
@given(st.sampled_from(ACTIONS), bodies)
def test_no_body_makes_it_raise(action: str, body: bytes) -> None:
    asked = Asked()
    status, answer, _ = asked.whole(action, body)
    assert status in (200, 202, 400, 409)
    if action != "record/dump":
        json.loads(answer)


def test_more_requests_than_may_wait_are_refused_until_one_is_answered() -> None:
    surface = BalanceSurface(Balanced().rebalancer)
    asked = BalanceAsk(number=1, action="state")
    assert all(surface.ask(5, asked) is None for _ in range(MAX_WAITING))
    refused = surface.ask(5, asked)
    assert refused is not None
    assert refused[0] == 503
    assert b"wait already" in refused[1].join()
    first, *_ = surface.take_questions()
    surface.conclude(solved(first), 0.0)
    assert surface.ask(5, asked) is None


def test_a_request_that_nobody_could_work_out_is_a_503_with_the_reason() -> None:
    surface = BalanceSurface(Balanced().rebalancer)
    surface.ask(5, BalanceAsk(number=1, action="state"))
    (question,) = surface.take_questions()
    _, (status, body, orders) = surface.conclude(Solved(question.number, 1.0, Unsolved("it exited with code 3")), 0.0)
    assert (status, orders) == (503, [])
    assert b"exited with code 3" in body.join()


def test_an_order_that_another_has_overtaken_while_it_was_worked_out_is_a_conflict() -> None:
    asked = Asked()
    asked.surface.ask(5, BalanceAsk(number=1, action="apply"))
    (question,) = asked.surface.take_questions()
    answer = solved(question)
    asked.balanced.finish(asked.balanced.begin())
    _, (status, body, orders) = asked.surface.conclude(answer, asked.balanced.now)
    assert (status, orders) == (409, [])
    assert b"has changed while this was planned" in body.join()
