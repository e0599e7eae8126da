"""When experts move and how a rearrangement goes on, with arrays and messages only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.base.balance_messages import Record, StageReport, StepLoad
from moe_serve.base.errors import ConfigError, Conflict
from moe_serve.eplb.books import MAX_HISTORY, MOVE_BYTES_PER_SECOND
from moe_serve.eplb.nodes import nodes_of_ranks
from moe_serve.eplb.placement import Placement, initial_placement, moves
from moe_serve.eplb.policies.base import Problem
from moe_serve.eplb.policies.shuffle import shuffle
from moe_serve.eplb.policies.static import static
from moe_serve.eplb.policies.sticky import sticky
from moe_serve.eplb.questions import PlanQuestion, Question, SharesQuestion, Solved, Unsolved
from moe_serve.eplb.rearrangement import MAX_CHUNK_BYTES, chunks_of
from moe_serve.eplb.rebalancer import ROLLBACK, SHARE_REFRESH_STEPS, STAGE_SECONDS
from moe_serve.eplb.shares import table_of_rank
from tests.support import policies
from tests.support.balancing import (
    EXPERTS,
    LAYERS,
    UNIX_TIME,
    Balanced,
    answer_all,
    drops,
    of_all,
    opened,
    shares,
    skewed,
    solved,
    stages,
)


def loaded(**options: object) -> Balanced:
    made = Balanced(**options)  # type: ignore[arg-type]
    made.load()
    return made


def broken(_problem: Problem) -> Placement:
    raise IndexError("off by one")


def forgetful(problem: Problem) -> Placement:
    """Leaves expert 0 out."""
    table = problem.start().physical_to_logical_LP.copy()
    table[table == 0] = 1
    return Placement(table, problem.offsets, problem.num_experts)


# --- when ------------------------------------------------------------------------------------------------------------


def test_the_first_rearrangement_comes_after_a_quarter_interval_the_next_after_a_whole_one() -> None:
    made = Balanced(step_interval=100)
    times = []
    for _ in range(300):
        staged = stages(made.load())
        if staged:
            times.append(made.step)
            made.finish(staged)
    assert times == [25, 125, 225]


def test_nothing_begins_while_a_rearrangement_is_under_way() -> None:
    made = Balanced(step_interval=4)
    first = stages(made.load())
    assert first
    assert not any(stages(made.load()) for _ in range(30))
    made.finish(first)
    assert stages(made.load()), "it was due long ago"


def test_buckets_of_several_steps_count_as_such() -> None:
    made = Balanced(step_interval=100)
    assert not stages(made.load(steps=24))
    assert stages(made.load(steps=5))


def test_without_tokens_nothing_moves_and_the_reason_is_counted() -> None:
    made = Balanced(step_interval=4)
    assert not made.load(np.zeros((LAYERS, 2, EXPERTS), dtype=np.int64))
    assert made.rebalancer.totals.skipped == {"no_load": 1}
    assert made.rebalancer.history[-1]["skipped"] == "no_load"


def test_a_policy_that_keeps_everything_is_a_skip() -> None:
    made = Balanced(policy=static, step_interval=4)
    assert not made.load()
    assert made.rebalancer.totals.skipped == {"no_moves": 1}


@pytest.mark.parametrize("policy", [broken, forgetful])
def test_a_policy_that_fails_or_forgets_an_expert_disturbs_nobody(policy: object) -> None:
    made = Balanced(policy=policy, step_interval=4)  # type: ignore[arg-type]
    assert not made.load()
    assert made.rebalancer.totals.skipped == {"policy_failed": 1}
    assert "the policy failed" in made.rebalancer.take_log()[0]
    with pytest.raises(ConfigError, match=r"off by one|no copy of experts"):
        made.propose()


def test_a_gain_that_does_not_pay_is_a_skip_that_says_so() -> None:
    made = Balanced(policy=sticky, step_interval=4, min_gain=0.99)
    assert not made.load()
    assert made.rebalancer.totals.skipped == {"small_gain": 1}
    assert "min_gain (99.00%)" in str(made.rebalancer.history[-1]["text"])


def test_a_gain_that_only_one_burst_promises_is_a_skip_of_its_own() -> None:
    made = Balanced(policy=sticky, step_interval=400, num_redundant=0, min_gain=1e-6)
    usual, burst = np.full((2, LAYERS, 2, EXPERTS), 10, dtype=np.int64)
    usual[..., [0, 1, 6, 7]] = burst[..., [6, 7]] = 20
    burst[..., [0, 1]] = 9000
    for number in range(20):
        made.load(burst if number == 7 else usual, steps=5)
    assert made.rebalancer.totals.skipped == {"within_noise": 1}
    assert "give or take" in str(made.rebalancer.history[-1]["text"])


def test_what_experts_took_is_forgotten_when_they_move() -> None:
    made = Balanced(step_interval=10_000)
    told = StepLoad(step=1, steps=1, load=skewed().tobytes(), expert_seconds=[0.001, 0.002])
    made.rebalancer.hear_load(told, made.now)
    assert made.rebalancer.window.parts()[0].expert_seconds_R == [0.001, 0.002]
    made.finish(made.begin())
    made.rebalancer.hear_load(told, made.now)
    made.rebalancer.hear_load(told, made.now)
    assert [part.expert_seconds_R for part in made.rebalancer.window.parts()] == [[], [], [0.001, 0.002]]


def test_min_gain_of_zero_applies_whatever_the_policy_says() -> None:
    worse = Balanced(policy=shuffle, step_interval=4, min_gain=0)
    assert stages(worse.load())


def test_a_large_move_in_a_short_horizon_does_not_pay() -> None:
    """Steps of 1 ms, 8 of them: moving gigabytes stalls for longer than the whole interval."""
    made = Balanced(policy=sticky, step_interval=8, min_gain=0.001, expert_bytes=1 << 30)
    for _ in range(4):
        orders = made.load(seconds=0.001)
    assert not stages(orders)
    assert set(made.rebalancer.totals.skipped) == {"small_gain"}
    cheap = Balanced(policy=sticky, step_interval=8, min_gain=0.001, expert_bytes=1)
    assert any(stages(cheap.load(seconds=0.001)) for _ in range(4))


def test_a_long_sleep_does_not_make_a_move_look_cheap() -> None:
    made = Balanced(policy=sticky, step_interval=8, min_gain=0.001, expert_bytes=1 << 30)
    for seconds in (0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001):
        made.now += 3600
        assert not stages(made.load(seconds=seconds))


def test_what_a_commit_took_prices_the_next_move() -> None:
    made = Balanced(policy=shuffle, step_interval=1000)
    made.load()
    assert made.rebalancer.books.bytes_per_second() == MOVE_BYTES_PER_SECOND
    made.load()
    assert made.finish(made.begin()) == 1
    made.load()
    assert made.rebalancer.books.bytes_per_second() == pytest.approx(600 / (0.25 + 0.05)), (
        "the commit, and the steps before it"
    )


# --- how it goes on --------------------------------------------------------------------------------------------------


def test_every_engine_gets_the_rows_of_the_layers_that_change_and_the_shares_for_its_ranks() -> None:
    made = loaded(dp=2, tp=2)
    plan = made.propose()
    assert made.rebalancer.apply(plan, made.now, why="request") == []
    orders = answer_all(made.rebalancer, made.now)
    assert [each.dp for each in orders] == [0, 1]
    assert orders[0].order is orders[1].order, "encoded once"
    (first, second) = stages([opened(each.order) for each in orders])
    assert first == second
    wanted = plan.placement.physical_to_logical_LP
    assert first.rows == {layer: wanted[layer].tolist() for layer in first.rows}
    for rank in range(4):
        cumulative = table_of_rank(first, first.rows, plan.placement, rank, layers=sorted(first.rows))
        assert (np.diff(cumulative, axis=2) >= 0).all(), rank
        assert (cumulative[:, :, -1] == 1).all(), rank


def test_a_placement_is_served_once_all_engines_have_committed_it() -> None:
    made = loaded()
    before, first = made.table, made.begin()
    made.report(0, "staged", 1)
    made.report(1, "staged", 1)
    made.report(0, "committed", 1)
    assert made.rebalancer.in_flight
    assert made.table == before
    made.report(1, "committed", 1)
    assert not made.rebalancer.in_flight
    assert made.table == [first[0].rows.get(layer, row) for layer, row in enumerate(before)]
    assert made.rebalancer.epoch == 1


def test_chunks_follow_each_other_and_are_one_rearrangement() -> None:
    made = loaded(expert_bytes=MAX_CHUNK_BYTES // 2)
    plan = made.propose()
    wanted = plan.placement.physical_to_logical_LP.tolist()
    num_moves = plan.num_moves
    assert made.finish(made.begin(plan.placement)) == LAYERS
    assert made.table == wanted
    assert made.rebalancer.totals.rebalances == 1
    assert made.rebalancer.totals.moved_experts == num_moves
    assert made.rebalancer.totals.stage_seconds == [2.0] * LAYERS
    (entry,) = (entry for entry in made.rebalancer.history if "epoch" in entry)
    assert entry["moved_bytes"] == LAYERS * 2 * 300
    assert entry["stage_seconds"] == LAYERS * 2.0
    assert entry["commit_seconds"] == LAYERS * 0.25
    assert not entry["failure"]
    assert made.rebalancer.totals.last_success == UNIX_TIME


def test_a_chunk_is_never_larger_than_its_bound_unless_one_layer_is() -> None:
    old = initial_placement("linear", num_layers=6, num_experts=16, num_ranks=4)
    new = shuffle(Problem(np.ones((6, 16)), old.offsets))
    load = np.random.default_rng(1).random((6, 16))
    for expert_bytes in (1, MAX_CHUNK_BYTES // 9, MAX_CHUNK_BYTES * 2):
        chunks = chunks_of(old, new, load, expert_bytes)
        assert sorted(layer for chunk in chunks for layer in chunk) == list(range(6))
        for chunk in chunks:
            differ = (old.physical_to_logical_LP != new.physical_to_logical_LP)[chunk]
            rows = max(int(differ[:, list(new.slots_of(rank))].sum()) for rank in range(4))
            assert len(chunk) == 1 or rows * expert_bytes <= MAX_CHUNK_BYTES


def test_layers_that_gain_most_go_first() -> None:
    old = initial_placement("linear", num_layers=2, num_experts=4, num_ranks=2)
    better = Placement(np.array([[0, 2, 1, 3]] * 2), old.offsets, 4)
    load = np.array([[5.0, 5.0, 5.0, 4.0], [9.0, 9.0, 0.0, 0.0]])
    assert chunks_of(old, better, load, MAX_CHUNK_BYTES) == [[1], [0]]


def test_a_failed_chunk_is_dropped_everywhere_and_the_rest_is_given_up() -> None:
    made = loaded(expert_bytes=MAX_CHUNK_BYTES // 2)
    before = made.table
    first = made.begin()
    made.report(0, "staged", 1)
    assert drops(made.report(1, "failed", 1, reason="another checksum")) == [1, 1]
    assert made.report(1, "failed", 1, reason="again") == [], "asked once"
    assert made.rebalancer.in_flight
    assert made.report(0, "dropped", 1) == []
    assert made.report(1, "dropped", 1) == []
    assert not made.rebalancer.in_flight
    assert made.table == before
    assert made.rebalancer.totals.skipped == {"stage_failed": 1}
    assert made.rebalancer.totals.rebalances == made.rebalancer.totals.moved_bytes == 0
    assert "engine dp 1: another checksum" in str(made.rebalancer.history[-1]["failure"])
    assert any("another checksum" in line for line in made.rebalancer.take_log())
    again = made.begin()
    assert again[0].epoch == first[0].epoch + 1, "an epoch is never used twice"


def test_chunks_before_a_failure_stay_and_can_be_rolled_back() -> None:
    made = loaded(expert_bytes=MAX_CHUNK_BYTES // 2)
    before = made.table
    first = made.begin()
    second = stages(made.all_report("committed", first[0].epoch))
    middle = made.table
    assert middle != before
    made.report(0, "failed", second[0].epoch)
    made.all_report("dropped", second[0].epoch)
    assert made.table == middle
    assert made.rebalancer.epoch == first[0].epoch
    assert made.rebalancer.totals.rebalances == 0
    made.finish(made.rollback())
    assert made.table == before


def test_a_drop_that_comes_too_late_leaves_the_commit_and_gives_up_the_rest() -> None:
    made = loaded(expert_bytes=MAX_CHUNK_BYTES // 2)
    first = made.begin()
    made.now += STAGE_SECONDS + 1
    assert len(made.rebalancer.tick(made.now)) == 2
    made.all_report("committed", first[0].epoch)
    assert made.table[next(iter(first[0].rows))] == next(iter(first[0].rows.values()))
    assert not made.rebalancer.in_flight
    assert made.rebalancer.totals.skipped == {"stage_silent": 1}
    last = loaded()
    only = last.begin()
    last.rebalancer.tick(last.now + STAGE_SECONDS + 1)
    last.all_report("committed", only[0].epoch)
    assert (last.rebalancer.totals.rebalances, last.rebalancer.totals.skipped) == (1, {}), "there was no rest"


def test_silence_is_given_up_after_its_time_naming_who_is_missing() -> None:
    made = loaded(dp=3)
    made.begin()
    made.report(1, "staged", 1)
    assert made.rebalancer.tick(made.now + STAGE_SECONDS - 1) == []
    assert len(made.rebalancer.tick(made.now + STAGE_SECONDS + 1)) == 3
    assert "waiting for dp 0, dp 2" in made.rebalancer.take_log()[-1]
    made.now += STAGE_SECONDS + 1
    assert made.rebalancer.tick(made.now) == []
    made.report(0, "dropped", 1)
    assert made.rebalancer.tick(made.now + STAGE_SECONDS + 1) == []
    assert "waiting for engines dp 1, dp 2" in made.rebalancer.take_log()[-1]


def test_any_news_keeps_a_chunk_alive() -> None:
    made = loaded()
    made.begin()
    for _ in range(5):
        made.now += STAGE_SECONDS - 10
        assert made.rebalancer.tick(made.now) == []
        made.report(0, "moving", 1)


def test_news_of_other_epochs_is_ignored() -> None:
    made = loaded()
    made.report(0, "committed", 1)
    first = made.begin()
    made.finish(first)
    table = made.table
    second = made.begin()
    for dp in (0, 1):
        assert made.rebalancer.hear_stage(dp, StageReport(epoch=1, state="dropped"), made.now) == []
    assert made.rebalancer.in_flight
    assert made.table == table
    made.finish(second)


# --- asked for -------------------------------------------------------------------------------------------------------


def test_applying_twice_at_once_is_a_conflict() -> None:
    made = loaded()
    first_table = made.rebalancer.placement
    first = made.begin()
    with pytest.raises(Conflict, match="under way"):
        made.begin()
    with pytest.raises(Conflict, match="under way"):
        made.apply(made.predict(first_table), why=ROLLBACK)
    made.finish(first)


def test_applying_what_is_served_is_refused() -> None:
    made = loaded()
    with pytest.raises(ConfigError, match="nothing to do"):
        made.begin(made.rebalancer.placement)


def test_a_placement_of_another_world_is_refused_with_both_sizes() -> None:
    made = loaded()
    other = initial_placement("linear", num_layers=LAYERS, num_experts=EXPERTS, num_ranks=4, num_redundant=2)
    with pytest.raises(ConfigError, match=r"on 4 ranks; served are 3 layers, 8 experts, 10 slots on 2 ranks"):
        made.predict(other)


def test_rollbacks_go_back_one_rearrangement_each() -> None:
    made = loaded()
    tables = [made.table]
    assert made.rebalancer.previous is None
    for _ in range(3):
        made.finish(made.begin())
        tables.append(made.table)
    for expected in tables[-2::-1]:
        made.finish(made.rollback())
        assert made.table == expected
    assert made.rebalancer.previous is None


def test_a_rollback_that_failed_can_be_tried_again() -> None:
    made = loaded()
    before = made.table
    made.finish(made.begin())
    back = made.rollback()
    made.report(0, "failed", back[0].epoch)
    made.all_report("dropped", back[0].epoch)
    assert made.table != before
    made.finish(made.rollback())
    assert made.table == before


def test_a_rollback_needs_no_load() -> None:
    made = loaded(window_size=1)
    made.finish(made.begin())
    made.load(np.zeros((LAYERS, 2, EXPERTS), dtype=np.int64))
    assert made.rollback()


def test_a_plan_says_what_it_moves_and_brings() -> None:
    made = loaded(policy=sticky)
    plan = made.propose()
    assert plan.num_moves == len(moves(made.rebalancer.placement, plan.placement)) > 0
    assert plan.num_bytes == plan.num_moves * 1000
    assert 0 < plan.balancedness_before < plan.balancedness_after <= 1
    assert 0 < plan.gain < 1
    with pytest.raises(ConfigError, match="zero everywhere"):
        Balanced().propose()


def test_history_is_bounded() -> None:
    made = Balanced(policy=static, step_interval=1)
    for _ in range(MAX_HISTORY + 10):
        made.load()
    assert len(made.rebalancer.history) == MAX_HISTORY


# --- what is being worked out -----------------------------------------------------------------------------------------


def asked_for_a_plan() -> tuple[Balanced, PlanQuestion]:
    """The interval is over and the question is out."""
    made = Balanced(step_interval=4)
    made.rebalancer.hear_load(StepLoad(step=1, steps=1, load=skewed().tobytes()), made.now)
    (question,) = made.rebalancer.take_questions()
    assert isinstance(question, PlanQuestion)
    return made, question


def failed(question: Question, reason: str = "no time") -> Solved:
    return Solved(question.number, 1.0, Unsolved(reason))


def test_while_a_plan_is_worked_out_reports_come_in_and_nothing_is_decided_twice() -> None:
    made, question = asked_for_a_plan()
    for step in range(2, 2 + 3 * SHARE_REFRESH_STEPS):
        made.rebalancer.hear_load(StepLoad(step=step, steps=1, load=skewed(step).tobytes()), made.now)
        assert made.rebalancer.take_questions() == []
    assert made.rebalancer.window.num_steps == 100
    assert np.array_equal(question.situation.load_LE, skewed().sum(axis=1)), "what was asked stays as it was"
    made.rebalancer.hear_solved(solved(question), made.now)
    (stage,) = made.rebalancer.take_questions()
    assert isinstance(stage, SharesQuestion)
    assert stage.stage
    assert made.rebalancer.in_flight


def test_a_plan_that_comes_after_a_manual_order_is_dropped_with_its_reason() -> None:
    made, question = asked_for_a_plan()
    made.rebalancer.apply(made.propose(), made.now, why="request")
    (stage,) = made.rebalancer.take_questions()
    assert made.rebalancer.totals.skipped == {"late": 1}
    assert made.rebalancer.hear_solved(solved(question), made.now) == []
    assert made.rebalancer.take_log() == [
        "dropped what came too late: a plan: a rearrangement (request) began meanwhile"
    ]
    assert made.rebalancer.hear_solved(solved(question), made.now) == [], "once more does no harm"
    assert "nobody asked for it" in made.rebalancer.take_log()[0]
    made.finish(stages(of_all(made.rebalancer.hear_solved(solved(stage), made.now))))
    assert made.rebalancer.totals.rebalances == 1


def test_shares_that_come_after_a_rearrangement_has_begun_are_dropped_with_their_reason() -> None:
    made = Balanced(step_interval=10_000)
    for step in range(SHARE_REFRESH_STEPS):
        made.rebalancer.hear_load(StepLoad(step=step, steps=1, load=skewed().tobytes()), made.now)
    (question,) = made.rebalancer.take_questions()
    first = made.begin()
    assert made.rebalancer.hear_solved(solved(question), made.now) == []
    assert "shares of copies: a rearrangement (request) began meanwhile" in made.rebalancer.take_log()[0]
    assert made.rebalancer.totals.skipped == {}, "no rearrangement was skipped"
    made.finish(first)


def test_a_plan_for_a_placement_that_is_no_longer_served_is_a_conflict() -> None:
    made = loaded()
    old = made.propose()
    made.finish(made.begin())
    with pytest.raises(Conflict, match="has changed while this was planned"):
        made.rebalancer.apply(old, made.now, why="request")


def test_shares_that_cannot_be_solved_are_a_skip_and_end_a_rearrangement_where_it_is() -> None:
    made = loaded(step_interval=10_000, expert_bytes=MAX_CHUNK_BYTES // 2)
    first = made.begin()
    for dp in (0, 1):
        report = StageReport(epoch=first[0].epoch, state="committed")
        made.rebalancer.hear_stage(dp, report, made.now)
    middle = made.table
    (stage,) = made.rebalancer.take_questions()
    assert made.rebalancer.hear_solved(failed(stage), made.now) == []
    assert not made.rebalancer.in_flight
    assert made.table == middle
    assert made.rebalancer.totals.skipped == {"stage_unsolved": 1}
    assert "no time" in str(made.rebalancer.history[-1]["failure"])
    while not (questions := made.rebalancer.take_questions()):
        made.rebalancer.hear_load(StepLoad(step=made.step, steps=1, load=skewed().tobytes()), made.now)
    assert made.rebalancer.hear_solved(failed(questions[0]), made.now) == []
    assert made.rebalancer.totals.skipped == {"stage_unsolved": 1, "shares_failed": 1}
    assert any("not solved: no time" in line for line in made.rebalancer.take_log())
    assert made.begin(), "and it can be tried again"


# --- shares and recordings -------------------------------------------------------------------------------------------


def test_shares_are_refreshed_for_the_epoch_that_is_served() -> None:
    made = Balanced(step_interval=10_000)
    made.load()
    made.finish(made.begin())
    found = [order for _ in range(2 * SHARE_REFRESH_STEPS) for order in shares(made.load())]
    assert len(found) == 2 * 2, "two refreshes, two engines"
    assert {order.epoch for order in found} == {1}
    assert [set(order.shares) for order in found] == [{0}] * 4, "one node"


@given(st.integers(0, 50), st.sampled_from([(1, 3), (2, 2), (3, 1), (1, 1, 2)]))
def test_rows_of_a_rank_take_its_own_copy_then_one_of_its_node(seed: int, node_sizes: tuple[int, ...]) -> None:
    balanced = Balanced(dp=2, tp=2, num_redundant=8)
    balanced.rebalancer.set_nodes(node_sizes)
    balanced.load(skewed(seed))
    balanced.finish(balanced.begin())
    counts = np.broadcast_to(skewed(seed), (LAYERS, 2, EXPERTS))
    orders = shares(balanced.load(counts, steps=SHARE_REFRESH_STEPS))
    assert len(orders) == 2
    placed, node_R = balanced.rebalancer.placement, nodes_of_ranks(node_sizes)
    rank_P, copies_LEC = placed.rank_of_slot(), placed.logical_to_physical()
    rows = dict(enumerate(placed.physical_to_logical_LP.tolist()))
    for rank in range(4):
        table_LEC = table_of_rank(orders[rank // 2], rows, placed, rank, layers=range(LAYERS))
        for layer, expert in np.ndindex(LAYERS, EXPERTS):
            slots = copies_LEC[layer, expert]
            slots = slots[slots >= 0]
            own, near = rank_P[slots] == rank, node_R[rank_P[slots]] == node_R[rank]
            allowed = own if own.any() else near if near.any() else np.ones(len(slots), dtype=bool)
            share = np.diff(table_LEC[layer, expert, : len(slots)], prepend=0.0)
            assert np.isclose(share[allowed].sum(), 1, atol=1e-6)


def test_a_policy_is_told_the_nodes_and_groups_of_the_world() -> None:
    balanced = Balanced(dp=2, tp=2, policy=policies.telling_the_world, num_groups=4)
    balanced.load(steps=100)
    balanced.rebalancer.set_nodes((1, 3))
    balanced.load(steps=100)
    told = [entry["text"] for entry in balanced.rebalancer.history]
    assert told == ["nodes (4,), groups 4", "nodes (1, 3), groups 4"]


def test_shares_rest_during_a_rearrangement_and_without_redundancy() -> None:
    made = loaded(step_interval=10_000)
    made.begin()
    assert not any(shares(made.load()) for _ in range(3 * SHARE_REFRESH_STEPS))
    plain = Balanced(step_interval=10_000, num_redundant=0)
    assert not any(shares(plain.load()) for _ in range(3 * SHARE_REFRESH_STEPS))


def test_shares_follow_the_recent_load_not_the_whole_window() -> None:
    made = Balanced(step_interval=10_000, window_size=1000, prefer_local=False)
    copied = [expert for expert in range(EXPERTS) if made.rebalancer.placement.copies()[0, expert] > 1]
    for _ in range(5 * SHARE_REFRESH_STEPS - 1):
        made.load(skewed(1))
    early = made.load(skewed(1))
    late = [made.load(skewed(2)) for _ in range(2 * SHARE_REFRESH_STEPS)][-1]
    fresh = Balanced(step_interval=10_000, window_size=1000, prefer_local=False)
    alone = [fresh.load(skewed(2)) for _ in range(SHARE_REFRESH_STEPS)][-1]
    assert copied
    assert shares(late) == shares(alone)
    assert shares(late) != shares(early)


def test_a_recording_holds_single_steps_and_ends_itself_when_it_is_full() -> None:
    made = Balanced(step_interval=10_000)
    orders = made.rebalancer.record(True)
    assert [each.order for each in orders] == [Record(on=True)] * 2
    made.load(steps=5)
    made.load(skewed(3))
    assert len(made.rebalancer.recording.steps) == 1, "a bucket of several steps is no step"
    assert (made.rebalancer.recording.steps[0] == skewed(3).sum(axis=1)).all()
    made.rebalancer.recording.limit = 3 * LAYERS * EXPERTS * 8
    assert made.load() == made.load() == []
    assert made.load() == [Record(on=False)] * 2
    assert len(made.rebalancer.recording.steps) == 3
    assert "full after 3 steps" in made.rebalancer.take_log()[-1]
    assert made.load() == []
