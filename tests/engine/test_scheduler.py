"""The scheduler with a fake executor that checks every plan: answers, budgets, preemption, aborts, sharing."""

from __future__ import annotations

import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serve.base.commands import Sampled, StepPlan, StepResult
from moe_serve.base.config import Config
from moe_serve.base.engine_messages import TokenEvent
from moe_serve.base.errors import EngineError
from moe_serve.base.sampling import SamplingParams
from moe_serve.engine.block_pool import BlockPool
from moe_serve.engine.request import make_request
from moe_serve.engine.scheduler import Scheduler
from tests.support.fakes import NOTHING, VOCAB_SIZE, FakeExecutor, absorb, expected_answer, logprob_of

EOS = 7


class Bench:
    """A scheduler and an executor, and all that came out of them."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 32,
        max_model_len: int = 64,
        caching: bool = True,
        reverts: bool = False,
    ) -> None:
        config = Config.from_flat(
            {"block_size": block_size, "max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget}
        )
        self.max_model_len = max_model_len
        self.executor = FakeExecutor(config, num_blocks=num_blocks, reverts=reverts)
        self.pool = BlockPool(num_blocks, block_size, caching=caching)
        self.scheduler = Scheduler(self.pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
        self.events: dict[str, list[TokenEvent]] = {}
        self.steps = 0

    def add(self, request_id: str, prompt: list[int], seed: int = 99, group: str = "", **sampling: object) -> None:
        params = msgspec.convert({"temperature": 0.0} | sampling, SamplingParams)
        self.events[request_id] = []
        self.scheduler.add(
            make_request(
                request_id,
                prompt,
                params,
                max_model_len=self.max_model_len,
                eos_token_ids=[EOS],
                draw_seed=lambda: seed,
                group=group,
            )
        )

    def schedule(self) -> StepPlan:
        self.steps += 1
        return msgspec.structs.replace(self.scheduler.schedule(), step=self.steps)

    def run(self, plan: StepPlan) -> list[TokenEvent]:
        return self.book(plan, self.carry_out(plan))

    def carry_out(self, plan: StepPlan) -> StepResult:
        """What the workers do with a plan."""
        result = self.executor.submit(plan).result()
        assert isinstance(result, StepResult)
        return result

    def book(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        events = self.scheduler.update(plan, result)
        for event in events:
            self.events[event.request_id].append(event)
        self.pool.check(request.blocks for request in self.scheduler.running.values())
        return events

    def step(self) -> list[TokenEvent]:
        return self.run(self.schedule())

    def drain(self, limit: int = 2000) -> None:
        while self.scheduler.has_work:
            assert limit > 0, "no end in sight"
            plan = self.schedule()
            assert plan.scheduled, "there is work, but nothing moves"
            self.run(plan)
            limit -= 1
        assert self.pool.num_free == self.pool.num_blocks

    def answer(self, request_id: str) -> tuple[list[int], str | None]:
        events = self.events[request_id]
        assert all(event.finish_reason is None for event in events[:-1])
        return [token for event in events for token in event.token_ids], events[-1].finish_reason


def prompt(length: int, first: int = 1) -> list[int]:
    return [first + index % 40 for index in range(length)]


def parts(plan: StepPlan) -> dict[str, tuple[int, int]]:
    return {part.request_id: (part.start, part.num_tokens) for part in plan.scheduled}


def test_a_request_gets_as_many_tokens_as_it_asked_for() -> None:
    bench = Bench()
    bench.add("a", [1, 2, 3], max_tokens=5, ignore_eos=True)
    bench.drain()
    tokens, reason = bench.answer("a")
    assert (len(tokens), reason) == (5, "length")


def test_a_long_prompt_is_computed_in_chunks_beside_running_requests() -> None:
    bench = Bench(budget=8)
    bench.add("short", [1, 2], max_tokens=20, ignore_eos=True)
    bench.step()
    bench.add("long", prompt(20), max_tokens=1)
    assert parts(bench.schedule()) == {"short": (2, 1), "long": (0, 7)}


def test_chunks_of_a_prompt_go_on_where_the_last_one_ended() -> None:
    bench = Bench(budget=8)
    bench.add("long", prompt(20), max_tokens=1)
    seen = []
    while bench.scheduler.has_work:
        plan = bench.schedule()
        seen.append(parts(plan)["long"])
        bench.run(plan)
    assert seen == [(0, 8), (8, 8), (16, 4)]


def test_no_more_requests_run_than_max_num_seqs() -> None:
    bench = Bench(max_num_seqs=2)
    for name in "abc":
        bench.add(name, [1, 2, 3], max_tokens=2, ignore_eos=True)
    plan = bench.schedule()
    assert list(parts(plan)) == ["a", "b"]
    bench.run(plan)
    bench.step()
    assert list(parts(bench.schedule())) == ["c"]


def test_the_youngest_request_is_preempted_and_still_gives_its_whole_answer() -> None:
    bench = Bench(num_blocks=6, block_size=2, max_model_len=12, caching=False)
    for name, first in (("old", 1), ("young", 9)):
        bench.add(name, prompt(4, first), max_tokens=8, ignore_eos=True)
    bench.drain()
    assert bench.scheduler.num_preemptions > 0
    assert "old" not in [new.request_id for plan in bench.executor.plans[1:] for new in plan.new]
    for name, first in (("old", 1), ("young", 9)):
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        assert bench.answer(name) == expected_answer(prompt(4, first), sampling, max_model_len=12)


def test_a_preempted_request_is_dropped_and_comes_back_whole_before_later_ones() -> None:
    bench = Bench(num_blocks=6, block_size=2, max_model_len=12, max_num_seqs=2, caching=False)
    bench.add("old", prompt(4, 1), max_tokens=8, ignore_eos=True)
    bench.add("young", prompt(4, 9), max_tokens=8, ignore_eos=True)
    bench.add("later", prompt(4, 17), max_tokens=8, ignore_eos=True)
    bench.drain()
    dropped = next(plan for plan in bench.executor.plans if plan.dropped)
    assert (dropped.dropped, list(parts(dropped))) == (["young"], ["old"])
    back, later = [new for plan in bench.executor.plans[1:] for new in plan.new][:2]
    assert (back.request_id, later.request_id) == ("young", "later")
    assert back.num_prompt_tokens == 4
    # Step 1 gave the first token, so 4 + 3 known tokens fill the 3 blocks each has when the pool runs dry.
    assert len(back.token_ids) == 7


def test_a_shared_prefix_is_not_computed_again() -> None:
    bench = Bench(block_size=4)
    bench.add("a", prompt(10), max_tokens=1)
    bench.drain()
    bench.add("b", prompt(10), max_tokens=1)
    plan = bench.schedule()
    assert parts(plan) == {"b": (8, 2)}
    events = bench.run(plan)
    assert events[0].num_cached_tokens == 8
    assert (bench.pool.prefix_queries, bench.pool.prefix_hits) == (20, 8)


def test_at_least_one_token_is_computed_even_if_all_blocks_are_known() -> None:
    bench = Bench(block_size=4)
    bench.add("a", prompt(8), max_tokens=1)
    bench.drain()
    bench.add("b", prompt(8), max_tokens=1)
    assert parts(bench.schedule()) == {"b": (4, 4)}


def test_blocks_are_shared_only_after_they_were_computed() -> None:
    bench = Bench(block_size=4, budget=64)
    bench.add("a", prompt(12), max_tokens=1)
    bench.add("b", prompt(12), max_tokens=1)
    assert parts(bench.schedule()) == {"a": (0, 12), "b": (0, 12)}


def test_generated_tokens_are_shared_with_the_next_turn_of_a_talk() -> None:
    bench = Bench(block_size=4)
    bench.add("a", prompt(6), max_tokens=6, ignore_eos=True)
    bench.drain()
    tokens, _ = bench.answer("a")
    bench.add("b", prompt(6) + tokens + [3], max_tokens=1)
    # The last generated token was never computed, so 11 positions are known: 2 full blocks.
    assert parts(bench.schedule()) == {"b": (8, 5)}


def test_nothing_is_shared_when_prefix_caching_is_off() -> None:
    bench = Bench(caching=False)
    bench.add("a", prompt(10), max_tokens=1)
    bench.drain()
    bench.add("b", prompt(10), max_tokens=1)
    assert parts(bench.schedule()) == {"b": (0, 10)}
    assert bench.pool.prefix_queries == 0


@pytest.mark.parametrize("budget", [3, 32])
def test_prompt_logprobs_cover_the_whole_prompt_despite_chunks_and_cached_prefixes(budget: int) -> None:
    bench = Bench(budget=budget, max_num_seqs=2)
    bench.add("warm", prompt(10), max_tokens=1)
    bench.drain()
    bench.add("a", prompt(10), max_tokens=2, prompt_logprobs=1, ignore_eos=True)
    bench.drain()
    past, wanted = NOTHING, []
    for token, following in zip(prompt(10), prompt(10)[1:], strict=False):
        past = absorb(past, token)
        wanted.append(logprob_of(past, following, 1))
    first, second = bench.events["a"]
    assert first.prompt_logprobs == wanted
    assert second.prompt_logprobs is None


def test_a_prompt_of_one_token_has_no_prompt_logprobs() -> None:
    bench = Bench()
    bench.add("a", [5], max_tokens=1, prompt_logprobs=0)
    assert bench.step()[0].prompt_logprobs == []


def test_prompt_logprobs_are_complete_after_a_preemption_in_the_middle_of_the_prompt() -> None:
    bench = Bench(num_blocks=12, block_size=2, max_model_len=24, budget=4, max_num_seqs=2, caching=False)
    bench.add("old", prompt(3), max_tokens=21, ignore_eos=True)
    while bench.pool.num_free > 8:
        bench.step()
    bench.add("young", prompt(16), max_tokens=1, prompt_logprobs=0)
    bench.drain()
    assert any("young" in plan.dropped for plan in bench.executor.plans[:-1])
    assert len(bench.events["young"][0].prompt_logprobs or []) == 15


def test_logprobs_come_one_per_token() -> None:
    bench = Bench()
    bench.add("a", [1, 2], max_tokens=3, logprobs=2, ignore_eos=True)
    bench.drain()
    for event in bench.events["a"]:
        assert event.logprobs is not None
        assert [entry.token_id for entry in event.logprobs] == event.token_ids
        assert len(event.logprobs[0].top) == 2


def answer_when_next_is(bench: Bench, tokens: list[int]) -> list[TokenEvent]:
    """Run the only request with a worker that samples these tokens."""
    events = []
    for token in tokens:
        plan = bench.schedule()
        events += bench.scheduler.update(plan, StepResult(step=plan.step, sampled=[Sampled("a", token)]))
    return events


def test_an_eos_token_ends_a_request_and_is_the_last_of_its_tokens() -> None:
    bench = Bench()
    bench.add("a", [1], max_tokens=10)
    events = answer_when_next_is(bench, [3, EOS])
    assert events[-1] == TokenEvent(request_id="a", token_ids=[EOS], finish_reason="stop", stop_token=EOS)
    assert not bench.scheduler.has_work


def test_ignore_eos_lets_eos_pass_but_not_an_explicit_stop_token() -> None:
    bench = Bench()
    bench.add("a", [1], max_tokens=10, ignore_eos=True, stop_token_ids=(9,))
    events = answer_when_next_is(bench, [EOS, EOS, 9])
    assert [event.finish_reason for event in events] == [None, None, "stop"]
    assert events[-1].stop_token == 9


def test_an_explicit_stop_token_that_is_eos_ends_even_with_ignore_eos() -> None:
    bench = Bench()
    bench.add("a", [1], max_tokens=10, ignore_eos=True, stop_token_ids=(EOS,))
    assert answer_when_next_is(bench, [EOS])[-1].stop_token == EOS


def test_a_stop_token_that_is_also_the_last_allowed_one_counts_as_stop() -> None:
    bench = Bench()
    bench.add("a", [1], max_tokens=1)
    assert answer_when_next_is(bench, [EOS])[-1].finish_reason == "stop"


def test_min_tokens_bans_the_tokens_that_would_end_the_request() -> None:
    bench = Bench()
    bench.add("a", [1], max_tokens=9, min_tokens=2, stop_token_ids=(3,))
    bench.add("b", [1], max_tokens=9, min_tokens=2, stop_token_ids=(3,), ignore_eos=True)
    plan = bench.schedule()
    assert [new.stop_ids for new in plan.new] == [[3, EOS], [3]]


def test_a_banned_token_that_comes_anyway_does_not_end_the_request() -> None:
    bench = Bench()
    bench.add("a", [1], max_tokens=9, min_tokens=2)
    events = answer_when_next_is(bench, [EOS, EOS, EOS])
    assert [event.finish_reason for event in events] == [None, None, "stop"]


def test_the_end_of_the_context_ends_a_request_with_length() -> None:
    bench = Bench(max_model_len=8)
    bench.add("a", [1, 2, 3], max_tokens=None, ignore_eos=True)
    bench.drain()
    tokens, reason = bench.answer("a")
    assert (len(tokens), reason) == (5, "length")


def test_a_request_without_a_seed_gets_a_drawn_one_and_keeps_it_when_preempted() -> None:
    bench = Bench(num_blocks=6, block_size=2, max_model_len=12, caching=False)
    bench.add("a", prompt(4, 1), max_tokens=8, ignore_eos=True, seed=5)
    bench.add("b", prompt(4, 9), max_tokens=8, ignore_eos=True, temperature=1.0)
    bench.drain()
    seeds = [new.sampling_seed for plan in bench.executor.plans for new in plan.new if new.request_id == "b"]
    assert len(seeds) > 1
    assert set(seeds) == {99}


def test_an_aborted_request_returns_its_blocks_and_is_dropped_by_the_workers() -> None:
    bench = Bench()
    bench.add("a", prompt(10), max_tokens=9, ignore_eos=True)
    bench.add("b", prompt(5), max_tokens=9, ignore_eos=True)
    bench.step()
    bench.scheduler.abort(["a", "nobody"])
    assert bench.pool.num_free == 62
    plan = bench.schedule()
    assert plan.dropped == ["a"]
    bench.run(plan)
    bench.drain()
    assert len(bench.events["a"]) == 1


def test_a_waiting_request_can_be_aborted_without_the_workers_hearing_of_it() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("a", [1], max_tokens=3, ignore_eos=True)
    bench.add("b", [1, 2], max_tokens=3)
    bench.step()
    assert bench.scheduler.waiting_tokens == 2
    bench.scheduler.abort(["b"])
    assert bench.scheduler.waiting_tokens == 0
    bench.drain()
    assert all("b" not in plan.dropped for plan in bench.executor.plans)


def test_the_result_of_a_request_aborted_in_flight_is_dropped() -> None:
    bench = Bench()
    bench.add("a", [1, 2], max_tokens=9)
    plan = bench.schedule()
    bench.scheduler.abort(["a"])
    assert bench.run(plan) == []
    assert not bench.scheduler.has_work


def test_an_id_used_again_while_its_aborted_request_is_in_flight_starts_afresh() -> None:
    bench = Bench()
    bench.add("a", [1, 2], max_tokens=9)
    plan = bench.schedule()
    bench.scheduler.abort(["a"])
    bench.add("a", [3, 4, 5], max_tokens=2, ignore_eos=True)
    assert bench.run(plan) == []
    bench.drain()
    sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    assert bench.answer("a") == expected_answer([3, 4, 5], sampling, max_model_len=64)


def test_an_empty_plan_carries_no_news_since_it_may_never_be_run() -> None:
    bench = Bench()
    bench.add("a", [1], max_tokens=1)
    bench.step()
    empty = bench.schedule()
    assert (empty.scheduled, empty.dropped, empty.tokens_by_dp_rank) == ([], [], [0])
    bench.add("b", [1], max_tokens=1)
    assert bench.schedule().dropped == ["a"]


def test_a_dummy_step_changes_nothing() -> None:
    bench = Bench()
    bench.step()
    bench.add("a", [1], max_tokens=1)
    bench.drain()


def test_waiting_tokens_counts_what_a_newcomer_has_to_wait_for() -> None:
    bench = Bench(budget=8)
    bench.add("a", prompt(20), max_tokens=2, ignore_eos=True)
    bench.add("b", prompt(5), max_tokens=2)
    assert bench.scheduler.waiting_tokens == 25
    bench.step()
    assert bench.scheduler.waiting_tokens == 17
    bench.step()
    assert bench.scheduler.waiting_tokens == 9
    bench.step()  # the last 4 tokens of a, the first 4 of b
    assert bench.scheduler.waiting_tokens == 0


def test_answers_that_do_not_fit_the_plan_are_errors() -> None:
    bench = Bench()
    bench.add("a", [1, 2], max_tokens=2, logprobs=0)
    plan = bench.schedule()
    with pytest.raises(EngineError, match="step 5 while step 1"):
        bench.scheduler.update(plan, StepResult(step=5))
    with pytest.raises(EngineError, match="no next token for request a"):
        bench.scheduler.update(plan, StepResult(step=1))
    bench = Bench()
    bench.add("a", [1, 2], max_tokens=2, logprobs=0)
    plan = bench.schedule()
    with pytest.raises(EngineError, match="no logprob"):
        bench.scheduler.update(plan, StepResult(step=1, sampled=[Sampled("a", 3)]))
    bench = Bench()
    bench.add("a", [1, 2], max_tokens=2, prompt_logprobs=0)
    plan = bench.schedule()
    with pytest.raises(EngineError, match="0 prompt logprobs"):
        bench.scheduler.update(plan, StepResult(step=1, sampled=[Sampled("a", 3)]))


samplings = st.builds(
    dict,
    max_tokens=st.one_of(st.none(), st.integers(3, 12)),
    min_tokens=st.integers(0, 3),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=12).map(tuple),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 5),
    logprobs=st.sampled_from([None, 2]),
    prompt_logprobs=st.sampled_from([None, None, 0]),
)
# Few different tokens, so that prompts often begin alike.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=23)


@st.composite
def loads(draw: st.DrawFn) -> dict[str, object]:
    block_size = draw(st.integers(1, 5))
    max_num_seqs = draw(st.integers(1, 6))
    least = -(-24 // block_size)
    return {
        "bench": {
            "block_size": block_size,
            "num_blocks": least + draw(st.integers(0, 2 * least)),
            "max_num_seqs": max_num_seqs,
            "budget": max_num_seqs + draw(st.integers(0, 20)),
            "max_model_len": 24,
            "caching": draw(st.booleans()),
        },
        "requests": draw(st.lists(st.tuples(prompts, samplings, st.integers(0, 20)), min_size=1, max_size=10)),
        # Fewer groups than requests: some share their turns.
        "groups": draw(st.lists(st.sampled_from(["", "x", "y"]), min_size=10, max_size=10)),
        # (turn, request, while its step is in flight)
        "aborts": draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9), st.booleans()), max_size=5)),
    }


@settings(max_examples=150, deadline=None)
@given(loads())
def test_every_answer_is_what_the_request_gives_alone(load: dict) -> None:  # type: ignore[type-arg]
    bench = Bench(**load["bench"])
    arrivals = sorted(enumerate(load["requests"]), key=lambda pair: pair[1][2])
    aborted: set[str] = set()
    for turn in range(600):
        while arrivals and arrivals[0][1][2] <= turn:
            number, (tokens, sampling, _) = arrivals.pop(0)
            bench.add(str(number), tokens, group=load["groups"][number], **sampling)

        def abort(in_flight: bool, turn: int = turn) -> None:
            for when, number, flying in load["aborts"]:
                if when == turn and flying == in_flight and bench.scheduler.knows(str(number)):
                    aborted.add(str(number))
                    bench.scheduler.abort([str(number)])

        abort(False)
        plan = bench.schedule()
        assert bool(plan.scheduled) == bench.scheduler.has_work, "there is work, but nothing moves"
        abort(True)
        bench.run(plan)
        if not arrivals and not bench.scheduler.has_work:
            break
    assert not bench.scheduler.has_work, "some request never ended"
    assert bench.pool.num_free == bench.pool.num_blocks
    for number, (tokens, sampling, _) in enumerate(load["requests"]):
        params = msgspec.convert(sampling, SamplingParams)
        answer, reason = expected_answer(tokens, params, max_model_len=24, eos_token_ids=[EOS])
        if str(number) in aborted:
            given_tokens = [token for event in bench.events[str(number)] for token in event.token_ids]
            assert given_tokens == answer[: len(given_tokens)]
        else:
            assert bench.answer(str(number)) == (answer, reason)
        if params.prompt_logprobs is not None and bench.events[str(number)]:
            assert len(bench.events[str(number)][0].prompt_logprobs or []) == len(tokens) - 1


def test_a_request_is_in_one_flight_at_a_time() -> None:
    bench = Bench(budget=8)
    bench.add("a", [1, 2, 3], max_tokens=4, ignore_eos=True)
    bench.add("b", prompt(9), max_tokens=4, ignore_eos=True)
    first = bench.schedule()
    bench.add("c", [4, 5], max_tokens=4, ignore_eos=True)
    second, third = bench.schedule(), bench.schedule()
    assert parts(first) == {"a": (0, 3), "b": (0, 5)}
    assert parts(second) == {"c": (0, 2)}
    assert parts(third) == {}
    results = [bench.carry_out(plan) for plan in (first, second)]
    bench.book(second, results[1])  # flights may land in another order
    assert parts(bench.schedule()) == {"c": (2, 1)}


def test_a_request_in_the_air_keeps_its_blocks_when_others_want_them() -> None:
    bench = Bench(num_blocks=8, block_size=2, max_model_len=16, caching=False)
    bench.add("old", prompt(8), max_tokens=8, ignore_eos=True)
    first = bench.schedule()
    bench.add("young", prompt(8), max_tokens=4, ignore_eos=True)
    second = bench.schedule()
    bench.run(first)
    assert bench.schedule().scheduled == []  # old wants a fifth block, and there are none
    assert bench.scheduler.num_preemptions == 0
    bench.run(second)
    assert parts(bench.schedule()) == {"old": (8, 1)}
    assert bench.scheduler.num_preemptions == 1


def test_a_step_that_is_put_back_is_planned_again_and_told_whole() -> None:
    bench = Bench(reverts=True)
    bench.add("a", [1, 2, 3], max_tokens=4, ignore_eos=True)
    bench.step()
    lost = bench.schedule()
    bench.carry_out(lost)  # but the answer never comes
    bench.scheduler.revert(lost)
    again = bench.schedule()
    assert parts(again) == parts(lost) == {"a": (3, 1)}
    assert again.dropped == ["a"]
    assert [new.token_ids for new in again.new] == [bench.scheduler.running["a"].token_ids]
    bench.run(again)
    bench.drain()
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    assert bench.answer("a") == expected_answer([1, 2, 3], sampling, max_model_len=64)


# What happens next: plan a step and have the workers carry it out, plan one that they never get, book or put back the
# n-th of those in the air.
flights = st.lists(
    st.tuples(st.sampled_from(["fly", "fly", "lose", "book", "book", "revert"]), st.integers(0, 2)), max_size=120
)


@settings(max_examples=150, deadline=None)
@given(loads(), flights)
def test_flights_that_overlap_land_in_any_order_or_are_put_back_change_no_answer(
    load: dict,  # type: ignore[type-arg]
    deeds: list[tuple[str, int]],
) -> None:
    bench = Bench(**load["bench"], reverts=True)
    for number, (tokens, sampling, _) in enumerate(load["requests"]):
        bench.add(str(number), tokens, **sampling)
    aborts = {when: str(number) for when, number, _ in load["aborts"]}
    aborted: set[str] = set()
    in_air: list[tuple[StepPlan, StepResult | None]] = []
    for turn, (deed, which) in enumerate(deeds):
        if turn in aborts and bench.scheduler.knows(aborts[turn]):
            aborted.add(aborts[turn])
            bench.scheduler.abort([aborts[turn]])
        if deed in ("fly", "lose"):
            plan = bench.schedule()
            if plan.scheduled:
                in_air.append((plan, bench.carry_out(plan) if deed == "fly" else None))
        elif in_air:
            plan, result = in_air.pop(which % len(in_air))
            if deed == "revert" or result is None:
                bench.scheduler.revert(plan)
            else:
                bench.book(plan, result)
    for plan, _ in in_air:
        bench.scheduler.revert(plan)
    bench.drain()
    for number, (tokens, sampling, _) in enumerate(load["requests"]):
        params = msgspec.convert(sampling, SamplingParams)
        answer, reason = expected_answer(tokens, params, max_model_len=24, eos_token_ids=[EOS])
        if str(number) in aborted:
            given_tokens = [token for event in bench.events[str(number)] for token in event.token_ids]
            assert given_tokens == answer[: len(given_tokens)]
        else:
            assert bench.answer(str(number)) == (answer, reason)


def test_scheduling_128_decodes_takes_well_under_a_millisecond() -> None:
    bench = Bench(num_blocks=4096, block_size=16, max_num_seqs=128, budget=2048, max_model_len=400)
    for number in range(128):
        bench.add(str(number), [number % 40, 1, 2], max_tokens=None, ignore_eos=True)
    bench.step()
    best = float("inf")
    for _ in range(60):
        started = time.perf_counter()
        plan = bench.schedule()
        seconds = time.perf_counter() - started
        result = StepResult(step=plan.step, sampled=[Sampled(part.request_id, 3) for part in plan.scheduled])
        started = time.perf_counter()
        bench.scheduler.update(plan, result)
        best = min(best, seconds + time.perf_counter() - started)
    assert best < 1e-3
