"""Requests take turns by HTTP request: who has many sequences does not keep out who has one."""

from __future__ import annotations

from moe_serve.engine.turns import GROUP_PLACES, GROUP_TOKENS, PROMPT_LOGPROB_PIECE
from tests.engine.test_scheduler import Bench, parts, prompt


def steps_until_done(bench: Bench, request_id: str, limit: int = 200) -> int:
    for number in range(limit):
        if bench.events[request_id] and bench.events[request_id][-1].finish_reason:
            return number
        bench.step()
    raise AssertionError(f"{request_id} is not done after {limit} steps")


def with_batch(count: int, *, length: int = 3, max_tokens: int = 30, **options: int) -> Bench:
    """A batch that runs for a while already."""
    bench = Bench(num_blocks=600, **options)  # type: ignore[arg-type]
    for number in range(count):
        bench.add(f"batch {number}", prompt(length), group="batch", max_tokens=max_tokens, ignore_eos=True)
    bench.step()
    bench.step()
    return bench


def test_a_short_request_does_not_wait_for_a_large_batch_that_came_first() -> None:
    bench = with_batch(100)
    assert len(bench.scheduler.running) == 8
    bench.add("short", [1, 2, 3], max_tokens=4, ignore_eos=True)
    assert steps_until_done(bench, "short") == 4
    bench.drain(5000)


def test_a_full_step_makes_way_for_who_has_nothing_running() -> None:
    bench = with_batch(8)
    bench.add("short", [1, 2, 3], max_tokens=2, ignore_eos=True)
    assert "short" in parts(bench.schedule())
    assert len(bench.scheduler.running) == 8, "one of the batch had to leave"


def test_nobody_makes_way_for_another_of_the_same_size() -> None:
    bench = Bench(max_num_seqs=2)
    for name in "abc":
        bench.add(name, [1, 2, 3], max_tokens=6, ignore_eos=True)
    bench.step()
    bench.step()
    assert sorted(bench.scheduler.running) == ["a", "b"]
    assert bench.scheduler.num_preemptions == 0


def test_blocks_of_a_batch_make_way_too() -> None:
    bench = Bench(num_blocks=20, block_size=2, max_model_len=20, caching=False, max_num_seqs=8)
    for number in range(8):
        bench.add(f"batch {number}", prompt(4), group="batch", max_tokens=16, ignore_eos=True)
    bench.step()
    bench.add("short", prompt(8), max_tokens=2, ignore_eos=True)
    assert steps_until_done(bench, "short") <= 4
    bench.drain(5000)


def test_a_batch_has_a_part_of_a_step_while_others_are_there_and_its_sequences_rotate() -> None:
    bench = with_batch(8)
    bench.add("other", [1, 2, 3], max_tokens=20, ignore_eos=True)
    seen: list[set[str]] = []
    for _ in range(4):
        plan = bench.schedule()
        seen.append({name for name in parts(plan) if name != "other"})
        bench.run(plan)
    assert all(len(names) == 8 // GROUP_PLACES for names in seen)
    assert len(set.union(*seen)) >= 7, "everybody of the batch gets on"


def test_a_batch_of_long_prompts_has_a_part_of_a_steps_tokens_while_others_are_there() -> None:
    bench = Bench(num_blocks=600, budget=64)
    for number in range(4):
        bench.add(f"batch {number}", prompt(60), group="batch", max_tokens=2)
    assert bench.schedule().num_tokens == 64, "alone it has all of it"
    bench = Bench(num_blocks=600, budget=64)
    bench.add("other", [1, 2, 3], max_tokens=20, ignore_eos=True)
    for number in range(4):
        bench.add(f"batch {number}", prompt(60), group="batch", max_tokens=2)
    plan = bench.schedule()
    assert sum(tokens for name, (_, tokens) in parts(plan).items() if name != "other") == 64 // GROUP_TOKENS


def test_one_long_prompt_by_itself_is_an_ordinary_step_beside_others() -> None:
    bench = Bench(num_blocks=600, budget=64)
    bench.add("other", [1, 2, 3], max_tokens=20, ignore_eos=True)
    bench.add("long", prompt(60), max_tokens=2)
    assert parts(bench.schedule())["long"] == (0, 60)


def test_prompt_logprobs_are_computed_in_bounded_pieces_and_others_go_on_beside_them() -> None:
    bench = Bench(num_blocks=600, budget=64)
    for number in range(3):
        bench.add(f"scored {number}", prompt(40), max_tokens=1, prompt_logprobs=2)
    bench.add("short", [1, 2, 3], max_tokens=2, ignore_eos=True)
    plan = bench.schedule()
    scored = sum(part.num_tokens for part in plan.scheduled if part.prompt_logprobs is not None)
    assert scored == 64 // PROMPT_LOGPROB_PIECE
    assert "short" in parts(plan), "who stands behind prompts that must wait does not"
    bench.run(plan)
    bench.drain()
    assert all(len(bench.events[f"scored {number}"][0].prompt_logprobs or []) == 39 for number in range(3))


def test_many_batches_get_the_same_share() -> None:
    bench = Bench(num_blocks=600, max_num_seqs=8)
    for group in ("x", "y"):
        for number in range(20):
            bench.add(f"{group}{number}", [1, 2, 3], group=group, max_tokens=30, ignore_eos=True)
    for _ in range(40):
        bench.step()
    tokens = {group: sum(len(bench.events[f"{group}{n}"]) for n in range(20)) for group in ("x", "y")}
    assert abs(tokens["x"] - tokens["y"]) <= 8, tokens
