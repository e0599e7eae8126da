"""The engine's loop against a protocol-checking fake executor: what it refuses, waits for and reports."""

from __future__ import annotations

import msgspec
import pytest

from moe_serve.base.commands import Done, Failed, StepPlan
from moe_serve.base.config import Config
from moe_serve.base.engine_messages import TokenEvent
from moe_serve.base.errors import ConfigError, ContextTooLong, EngineError, RankTimeout, RequestError, WorkerDied
from moe_serve.base.sampling import SamplingParams
from moe_serve.engine.core import EngineCore
from tests.support.fakes import VOCAB_SIZE, FakeExecutor, expected_answer

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def make_core(num_blocks: int = 32, max_model_len: int = 64, **options: object) -> tuple[EngineCore, FakeExecutor]:
    config = Config.from_flat({"block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16} | options)
    executor = FakeExecutor(config, num_blocks=num_blocks)
    core = EngineCore(
        executor,
        config=config,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=[7, 10**6],
        step_timeout=0.05,
        name="DP rank 3",
        draw_seed=lambda: 11,
    )
    return core, executor


def drain(core: EngineCore) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    while core.has_work:
        for event in core.step():
            events.setdefault(event.request_id, []).append(event)
    return events


def test_requests_of_all_lengths_are_answered_as_if_alone() -> None:
    core, _ = make_core()
    prompts = {str(length): [length] * length for length in (1, 5, 16, 17, 40)}
    for name, prompt in prompts.items():
        core.add(name, prompt, GREEDY)
    events = drain(core)
    for name, prompt in prompts.items():
        tokens = [token for event in events[name] for token in event.token_ids]
        assert tokens == expected_answer(prompt, GREEDY, max_model_len=64)[0]
    assert core.report().free_blocks == 32


@pytest.mark.parametrize("stages", [2, 3])
def test_with_pipeline_stages_as_many_flights_share_what_there_is(stages: int) -> None:
    core, _ = make_core(pipeline_parallel_size=stages, max_num_seqs=12, max_num_batched_tokens=64)
    prompts = {str(number): [number] * (number + 1) for number in range(9)}
    for name, prompt in prompts.items():
        core.add(name, prompt, GREEDY)
    events: dict[str, list[TokenEvent]] = {}
    sizes: list[list[int]] = []
    while core.has_work:
        for event in core.step():
            events.setdefault(event.request_id, []).append(event)
        sizes.append([len(flight.plan.scheduled) for flight in core.in_air])
    assert all(max(each) - min(each) <= 1 for each in sizes[stages:-stages]), sizes
    assert max(map(len, sizes)) == stages - 1, "one has ended whenever it is full"
    for name, prompt in prompts.items():
        tokens = [token for event in events[name] for token in event.token_ids]
        assert tokens == expected_answer(prompt, GREEDY, max_model_len=64)[0]
    assert core.report().free_blocks == 32


def test_what_was_aborted_in_the_air_is_landed_before_the_engine_has_no_work() -> None:
    core, executor = make_core(pipeline_parallel_size=2)
    core.add("a", [1, 2], GREEDY)
    core.step()
    core.abort(["a"])
    while core.has_work:
        assert core.step() == []
    assert not core.in_air
    assert len(executor.plans) == 1


def test_a_step_without_work_asks_nothing_of_the_workers() -> None:
    core, executor = make_core()
    assert core.step() == []
    assert executor.plans == []


def test_a_dummy_step_reaches_the_workers_and_is_counted() -> None:
    core, executor = make_core()
    plan = msgspec.structs.replace(core.schedule(), step=9, tokens_by_dp_rank=[0, 5])
    assert core.end(core.begin(plan)).events == []
    assert executor.plans == [plan]
    assert (core.report().step, core.report().steps, core.report().dummy_steps) == (9, 1, 1)


def test_steps_are_numbered_and_carry_their_own_count() -> None:
    core, executor = make_core()
    core.add("a", [1, 2, 3], GREEDY)
    drain(core)
    assert [plan.step for plan in executor.plans] == [1, 2, 3, 4, 5, 6]
    assert [plan.tokens_by_dp_rank for plan in executor.plans] == [[3], [1], [1], [1], [1], [1]]


def test_a_step_planned_before_an_abort_can_still_be_run() -> None:
    core, _ = make_core()
    core.add("a", [1, 2, 3], GREEDY)
    core.add("b", [4, 5], GREEDY)
    plan = core.schedule()
    core.abort(["a"])
    assert [event.request_id for event in core.end(core.begin(plan)).events] == ["b"]
    drain(core)
    assert core.report().free_blocks == 32


def test_the_report_tells_how_the_engine_stands() -> None:
    core, _ = make_core()
    for name in "abcde":
        core.add(name, [1, 2, 3, 4, 5], GREEDY)
    assert (core.report().num_waiting, core.report().waiting_tokens) == (5, 25)
    core.step()
    report = core.report()
    # 16 tokens a step: three prompts and the first token of the fourth; the fifth finds no slot.
    assert (report.num_running, report.num_waiting, report.waiting_tokens) == (4, 1, 9)
    assert report.free_blocks == 24
    assert (report.prefix_cache_queries, report.prefix_cache_hits) == (20, 0)
    drain(core)
    assert core.report().prefix_cache_hits == 4


def refused(core: EngineCore, prompt: list[int], sampling: SamplingParams = GREEDY) -> RequestError:
    with pytest.raises(RequestError) as caught:
        core.add("x", prompt, sampling)
    return caught.value


def test_a_request_that_cannot_be_served_is_refused_with_the_field_and_disturbs_nobody() -> None:
    core, _ = make_core()
    core.add("a", [1, 2], GREEDY)
    assert refused(core, []).param == "prompt"
    assert "-1" in str(refused(core, [1, -1]))
    assert f"token id {VOCAB_SIZE}, outside the vocabulary [0, {VOCAB_SIZE})" in str(refused(core, [1, VOCAB_SIZE]))
    assert refused(core, [1], SamplingParams(stop_token_ids=(VOCAB_SIZE,))).param == "stop_token_ids"
    assert refused(core, [1], SamplingParams(logit_bias={VOCAB_SIZE: 1.0})).param == "logit_bias"
    all_but_the_end = tuple(token for token in range(VOCAB_SIZE) if token != 7)
    nothing_left = refused(core, [1], SamplingParams(min_tokens=1, stop_token_ids=all_but_the_end))
    assert nothing_left.param == "stop_token_ids"
    assert len(drain(core)["a"]) == 6


def test_a_prompt_that_leaves_no_room_for_a_token_is_too_long_and_the_error_has_both_numbers() -> None:
    core, _ = make_core()
    error = refused(core, [1] * 64)
    assert isinstance(error, ContextTooLong)
    assert "has 64 tokens" in str(error)
    assert "of 64 tokens (--max-model-len)" in str(error)
    core.add("fits", [1] * 63, GREEDY)
    assert len(drain(core)["fits"]) == 1


def test_an_id_in_use_is_refused_and_free_again_when_its_request_has_ended() -> None:
    core, _ = make_core()
    core.add("x", [1], GREEDY)
    assert "already in use" in str(refused(core, [2]))
    drain(core)
    core.add("x", [1], GREEDY)


def test_a_cache_that_cannot_hold_one_sequence_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"15 KV blocks of 4 tokens .*\(64\).*--max-model-len"):
        make_core(num_blocks=15)


def test_drawn_seeds_and_end_tokens_inside_the_vocabulary_reach_the_workers() -> None:
    core, executor = make_core()
    core.add("a", [1], SamplingParams(max_tokens=1))
    core.add("b", [1], SamplingParams(max_tokens=1, seed=-4))
    drain(core)
    assert [(new.sampling_seed, new.stop_ids) for new in executor.plans[0].new] == [(11, [7]), (-4, [7])]


def test_prefix_caching_can_be_switched_off() -> None:
    core, _ = make_core(enable_prefix_caching=False)
    for name in "ab":
        core.add(name, [1] * 9, GREEDY)
        drain(core)
    assert core.report().prefix_cache_queries == 0


def started(core: EngineCore) -> StepPlan:
    core.add("a", [1, 2], GREEDY)
    return core.schedule()


def test_a_step_that_takes_too_long_says_which_workers_are_missing() -> None:
    core, executor = make_core()
    executor.silent = True
    with pytest.raises(RankTimeout, match=r"workers of DP rank 3 did not answer step 0 \(2 tokens\) within 0.05 s"):
        core.end(core.begin(started(core)))


def test_a_timeout_found_by_the_executor_keeps_its_own_words() -> None:
    core, executor = make_core()
    executor.failure = RankTimeout("tp rank 1 is missing")
    with pytest.raises(RankTimeout, match=r"^tp rank 1 is missing$"):
        core.end(core.begin(started(core)))


def test_a_dead_worker_ends_the_step() -> None:
    core, executor = make_core()
    executor.failure = WorkerDied("tp rank 1 is gone")
    with pytest.raises(WorkerDied, match="tp rank 1"):
        core.end(core.begin(started(core)))


@pytest.mark.parametrize(("reply", "words"), [(Failed("no memory"), "no memory"), (Done(), "sent Done for step 0")])
def test_a_reply_that_is_no_result_is_an_engine_error(reply: Failed | Done, words: str) -> None:
    core, executor = make_core()
    executor.wrong = reply
    with pytest.raises(EngineError, match=words):
        core.end(core.begin(started(core)))
