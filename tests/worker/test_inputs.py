"""Step plans become rows: what is remembered, what is new, which rows are asked for logits."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.base.commands import NewRequest, Scheduled, StepPlan
from moe_serve.base.sampling import SamplingParams
from moe_serve.base.topology import Topology
from moe_serve.worker.inputs import PromptRows, RequestTable, rows_by_ep_rank


@pytest.fixture
def table():
    return RequestTable(block_size=4, samples=True, device=torch.device("cpu"))


def new(name, tokens, blocks, num_prompt=None):
    return NewRequest(
        request_id=name,
        token_ids=tokens,
        num_prompt_tokens=len(tokens) if num_prompt is None else num_prompt,
        block_ids=blocks,
        sampling=SamplingParams(),
        sampling_seed=1,
    )


def plan(*parts, new=(), dropped=()):
    return StepPlan(step=1, scheduled=list(parts), new=list(new), dropped=list(dropped), tokens_by_dp_rank=[0])


def test_prefill_chunk_and_decode_share_a_step(table):
    table.build(plan(Scheduled(request_id="a", start=0, num_tokens=3, sample=True), new=[new("a", [7, 8, 9], [5])]), ())
    step = table.build(
        plan(
            Scheduled(request_id="a", start=3, num_tokens=1, new_token_ids=[42], sample=True),
            Scheduled(request_id="b", start=2, num_tokens=4),
            new=[new("b", list(range(100, 110)), [1, 2])],
        ),
        (5,),
    )
    assert step.token_ids_T.tolist() == [42, 102, 103, 104, 105]
    assert step.positions_T.tolist() == [3, 2, 3, 4, 5]
    assert step.token_ids_T.dtype == step.positions_T.dtype == torch.int64
    assert step.sample_rows == [0]
    assert step.sample_ids == ["a"]
    assert step.shape.sequences_S4[:, :3].tolist() == [[0, 1, 3], [1, 4, 2]]
    assert [step.shape.table(index).tolist() for index in range(2)] == [[5], [1, 2]]
    assert step.shape.slots_T.tolist() == [23, 6, 7, 8, 9]
    assert step.rows_by_ep_rank == (5,)


def test_new_blocks_and_tokens_are_appended(table):
    table.build(plan(Scheduled(request_id="a", start=0, num_tokens=4), new=[new("a", [1, 2, 3, 4], [9])]), ())
    step = table.build(
        plan(Scheduled(request_id="a", start=4, num_tokens=1, new_token_ids=[6], new_block_ids=[3], sample=True)), ()
    )
    assert step.shape.table(0).tolist() == [9, 3]
    assert table.state("a").length == 5
    assert table.state("a").num_generated == 1


def test_the_planners_own_lists_are_not_touched(table):
    tokens, blocks = [1, 2], [4]
    table.build(plan(Scheduled(request_id="a", start=0, num_tokens=2), new=[new("a", tokens, blocks)]), ())
    table.build(plan(Scheduled(request_id="a", start=2, num_tokens=1, new_token_ids=[3], new_block_ids=[5])), ())
    assert tokens == [1, 2]
    assert blocks == [4]


def test_a_dropped_request_may_come_back_whole_in_the_same_plan(table):
    table.build(plan(Scheduled(request_id="a", start=0, num_tokens=2), new=[new("a", [1, 2], [4])]), ())
    step = table.build(
        plan(
            Scheduled(request_id="a", start=0, num_tokens=3, sample=True),
            dropped=["a", "never known"],
            new=[new("a", [1, 2, 3], [8], num_prompt=2)],
        ),
        (),
    )
    assert step.token_ids_T.tolist() == [1, 2, 3]
    assert step.shape.table(0).tolist() == [8]
    assert table.state("a").num_generated == 1


def test_dropped_requests_are_forgotten(table):
    table.build(plan(Scheduled(request_id="a", start=0, num_tokens=2), new=[new("a", [1, 2], [4])]), ())
    table.build(plan(dropped=["a"]), ())
    assert len(table) == 0


@pytest.mark.parametrize(("blocks", "num_tokens"), [([9], 5), ([9, 3], 6)])
def test_a_plan_that_goes_past_what_is_known_is_refused(table, blocks, num_tokens):
    part = Scheduled(request_id="a", start=0, num_tokens=num_tokens)
    with pytest.raises(AssertionError, match="past the known"):
        table.build(plan(part, new=[new("a", [1, 2, 3, 4, 5], blocks)]), ())


def test_a_dummy_step_has_no_rows(table):
    step = table.build(plan(), (0, 3))
    assert step.token_ids_T.shape == step.positions_T.shape == (0,)
    assert len(step.shape.sequences_S4) == len(step.shape.slots_T) == 0
    assert step.sample_rows == []


@given(length=st.integers(1, 12), cuts=st.sets(st.integers(1, 11)), generated=st.integers(0, 3))
def test_chunks_ask_for_every_prompt_logprob_once(length, cuts, generated):
    table = RequestTable(block_size=4, samples=True, device=torch.device("cpu"))
    tokens = list(range(50, 50 + length + generated))
    edges = [0, *sorted(cut for cut in cuts if cut < len(tokens)), len(tokens)]
    found = []
    for start, end in itertools.pairwise(edges):
        first = [new("a", tokens, [0, 1, 2, 3], num_prompt=length)] if start == 0 else []
        part = Scheduled(request_id="a", start=start, num_tokens=end - start, prompt_logprobs=2)
        step = table.build(plan(part, new=first), ())
        for rows in step.prompt_rows:
            assert isinstance(rows, PromptRows)
            at = step.positions_T[rows.first_row : rows.first_row + len(rows.targets)].tolist()
            found += list(zip(at, rows.targets, strict=True))
    assert found == [(place, tokens[place + 1]) for place in range(length - 1)]


def test_tensor_ranks_that_do_not_sample_keep_no_sampling_state():
    table = RequestTable(block_size=4, samples=False, device=torch.device("cpu"))
    step = table.build(
        plan(Scheduled(request_id="a", start=0, num_tokens=2, sample=True), new=[new("a", [1, 2], [4])]), ()
    )
    assert step.sample_rows == [1]
    with pytest.raises(AssertionError):
        table.state("a")


def test_an_engines_rows_are_cut_over_its_tensor_ranks():
    assert rows_by_ep_rank([5, 0], Topology(dp=2, tp=2)) == (3, 2, 0, 0)
    assert rows_by_ep_rank([7], Topology()) == (7,)


def test_rows_are_told_apart_by_request_and_position_and_generated_ones_marked():
    table = RequestTable(block_size=4, samples=True, device=torch.device("cpu"), watches_load=True)
    both = [new("a", [1, 2, 3, 4, 5], [0, 1], num_prompt=3), new("b", [1, 2], [2])]
    parts = [Scheduled(request_id="a", start=1, num_tokens=4), Scheduled(request_id="b", start=0, num_tokens=2)]
    step = table.build(plan(*parts, new=both), ())
    assert step.decode_T.tolist() == [0, 0, 1, 1, 0, 0]
    hashes = step.row_hash_T.tolist()
    assert len(set(hashes)) == 6
    again = table.build(plan(Scheduled(request_id="b", start=1, num_tokens=1)), ())
    assert again.row_hash_T.tolist() == hashes[-1:], "whatever else is in the batch"
    one = table.build(plan(Scheduled(request_id="a", start=4, num_tokens=1)), ())
    assert one.row_hash_T.tolist() == hashes[3:4]
    assert one.decode_T.tolist() == [1]


def test_where_no_load_is_watched_rows_have_no_hashes(table):
    step = table.build(plan(Scheduled(request_id="a", start=0, num_tokens=2), new=[new("a", [1, 2], [4])]), ())
    assert step.row_hash_T is step.decode_T is None
