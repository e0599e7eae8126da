"""The sampler against a slow oracle in numpy, row by row, and against what sampling must never depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.paths import available

from moe_serve.base.sampling import SamplingParams
from moe_serve.model.layers.argmax import argmax
from moe_serve.worker.sampling import sampler
from moe_serve.worker.sampling.logprobs import token_logprobs
from moe_serve.worker.sampling.sampler import SamplingState, uniform

V = 50


def sample(logits, states, path=None):
    best, sound = argmax(logits, path)
    assert sound.all()
    return sampler.sample(logits, best, states, path)


def make_state(params, *, seed=7, prompt=(1, 2, 3), generated=(), stop_ids=(), name="r"):
    tokens = [*prompt, *generated]
    return SamplingState(name, params, seed=seed, token_ids=tokens, num_prompt_tokens=len(prompt), stop_ids=stop_ids)


def edited(logits, params, prompt, generated, stop_ids):
    """float64 logits after bias, ban and penalties, one token at a time."""
    z = [float(value) for value in logits]
    for token, bias in params.logit_bias.items():
        z[token] = float(np.float32(np.float32(z[token]) + np.float32(bias)))
    if len(generated) < params.min_tokens:
        for token in stop_ids:
            z[token] = -math.inf
    for token in range(len(z)):
        count = list(generated).count(token)
        if count or token in prompt:
            z[token] = z[token] / params.repetition_penalty if z[token] > 0 else z[token] * params.repetition_penalty
        z[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    return z


def distribution(logits, params, prompt, generated, stop_ids):
    """Token -> probability, by the definition of every filter."""
    z = edited(logits, params, prompt, generated, stop_ids)
    best = max(z)
    weight = {token: math.exp((value - best) / params.temperature) for token, value in enumerate(z)}
    kept = {token for token in weight if weight[token] >= params.min_p}
    if 0 < params.top_k < len(z):
        limit = sorted(z, reverse=True)[params.top_k - 1]
        kept = {token for token in kept if z[token] >= limit}
    if params.top_p < 1:
        need = params.top_p * sum(weight[token] for token in kept)
        have = 0.0
        for token in sorted(kept, key=lambda token: -z[token]):
            have += weight[token]
            if have >= need:
                kept = {other for other in kept if z[other] >= z[token]}
                break
    total = sum(weight[token] for token in kept)
    return {token: weight[token] / total for token in sorted(kept)}


def oracle(logits, params, prompt, generated, stop_ids, seed):
    """The tokens that may come out: one, or two where the random number lies on a boundary within rounding."""
    if params.greedy:
        z = edited(logits, params, prompt, generated, stop_ids)
        return {token for token, value in enumerate(z) if value >= max(z) - 1e-5}
    probabilities = distribution(logits, params, prompt, generated, stop_ids)
    aim, have, found = uniform(seed, len(prompt) + len(generated)), 0.0, set()
    for token, probability in probabilities.items():
        if have - 1e-5 <= aim < have + probability + 1e-5:
            found.add(token)
        have += probability
    return found


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.7]),
    top_p=st.sampled_from([0.05, 0.31, 0.83, 0.957, 1.0]),
    top_k=st.sampled_from([-1, 0, 1, 3, 10, V - 1, V, 1000]),
    min_p=st.sampled_from([0.0, 0.013, 0.21, 1.0]),
    presence_penalty=st.sampled_from([0.0, -1.3, 1.7]),
    frequency_penalty=st.sampled_from([0.0, -0.9, 0.6]),
    repetition_penalty=st.sampled_from([1.0, 0.6, 1.4]),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100.0, -2.5, 3.5]), max_size=4),
    min_tokens=st.integers(0, 4),
)
tokens_strategy = st.lists(st.integers(0, V - 1), max_size=6)
row_strategy = st.tuples(
    params_strategy,
    st.lists(st.integers(0, V - 1), min_size=1, max_size=6),
    tokens_strategy,
    st.lists(st.integers(0, V - 1), max_size=2, unique=True),
    st.integers(-(2**63), 2**63 - 1),
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(row_strategy, min_size=1, max_size=6), noise=st.integers(0, 2**32 - 1))
def test_every_row_gets_a_token_the_oracle_allows(rows, noise):
    logits = torch.randn(len(rows), V, generator=torch.Generator().manual_seed(noise)) * 3
    before = logits.clone()
    states = [
        make_state(params, seed=seed, prompt=prompt, generated=generated, stop_ids=stop_ids, name=str(index))
        for index, (params, prompt, generated, stop_ids, seed) in enumerate(rows)
    ]
    found = sample(logits, states)
    assert torch.equal(logits, before)
    for index, (params, prompt, generated, stop_ids, seed) in enumerate(rows):
        allowed = oracle(logits[index].tolist(), params, prompt, generated, stop_ids, seed)
        assert found[index].request_id == str(index)
        assert found[index].token_id in allowed


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(row_strategy, min_size=2, max_size=6), noise=st.integers(0, 2**32 - 1))
def test_a_row_does_not_depend_on_the_others_in_its_batch(rows, noise):
    # Coarse logits tie often, which is where a filter that depends on a sort would show.
    logits = (torch.randn(len(rows), V, generator=torch.Generator().manual_seed(noise)) * 3).round()
    states = [
        make_state(params, seed=seed, prompt=prompt, generated=generated, stop_ids=stop_ids)
        for params, prompt, generated, stop_ids, seed in rows
    ]
    together = [each.token_id for each in sample(logits, states)]
    alone = [sample(logits[row : row + 1], [state])[0].token_id for row, state in enumerate(states)]
    backwards = [each.token_id for each in sample(logits.flip(0), states[::-1])][::-1]
    assert together == alone == backwards


def test_learning_tokens_one_by_one_equals_being_told_all_after_a_preemption():
    params = SamplingParams(presence_penalty=1, frequency_penalty=0.5, repetition_penalty=1.3, min_tokens=3)
    grown = make_state(params, stop_ids=[4])
    for token in (5, 5, 9):
        grown.append([token])
    told = make_state(params, generated=(5, 5, 9), stop_ids=[4])
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(0))
    assert sample(logits, [grown]) == sample(logits, [told])
    assert grown.uniform() == told.uniform()
    assert dict(zip(grown.counts.tokens.tolist(), grown.counts.counts.tolist(), strict=True)) == {
        1: 0,
        2: 0,
        3: 0,
        5: 2,
        9: 1,
    }


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6, top_k=8),
        SamplingParams(temperature=1.4, top_p=0.8, min_p=0.02),
        SamplingParams(temperature=0.9, repetition_penalty=1.5, logit_bias={7: 2.0}),
    ],
)
def test_frequencies_follow_the_distribution(params):
    n = 20_000
    logits = torch.randn(V, generator=torch.Generator().manual_seed(5)) * 1.5
    expected = distribution(logits.tolist(), params, (1, 2, 3), (), ())
    states = [make_state(params, seed=seed) for seed in range(n)]
    found = np.bincount([each.token_id for each in sample(logits.expand(n, V), states)], minlength=V)
    assert set(np.flatnonzero(found)) <= set(expected)
    mean = np.array([expected[token] * n for token in expected])
    deviation = ((found[list(expected)] - mean) ** 2 / mean).sum()
    # Far beyond what chance allows: mean is len - 1, standard deviation sqrt(2 (len - 1)).
    freedom = len(expected) - 1
    assert deviation < freedom + 5 * math.sqrt(2 * freedom)


def test_uniform_numbers_are_spread_and_differ_by_seed_and_position():
    numbers = np.array([[uniform(seed, position) for position in range(300)] for seed in range(-20, 20)])
    assert len(np.unique(numbers)) == numbers.size
    assert 0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 600) ** 2 / 600).sum() < 19 + 5 * math.sqrt(38)
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.05


def test_the_largest_random_number_still_gives_a_possible_token(monkeypatch):
    monkeypatch.setattr(SamplingState, "uniform", lambda self: 1 - 2.0**-53)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        logits = torch.randn(1, V, generator=generator) * 2
        token = sample(logits, [make_state(SamplingParams(top_k=5))])[0].token_id
        assert token in logits[0].topk(5).indices


def test_top_p_beyond_the_sorted_head_falls_back_to_the_whole_vocabulary(monkeypatch):
    logits = torch.randn(8, V, generator=torch.Generator().manual_seed(2)) * 0.2
    states = [make_state(SamplingParams(top_p=0.95), seed=seed) for seed in range(8)]
    whole = sample(logits, states)
    monkeypatch.setattr(sampler, "FIRST_SORTED", 4)
    assert sample(logits, states) == whole


def test_a_large_batch_is_drawn_in_parts_with_the_same_result(monkeypatch):
    logits = torch.randn(16, V, generator=torch.Generator().manual_seed(3))
    states = [make_state(SamplingParams(temperature=0.8 * (seed % 3)), seed=seed) for seed in range(16)]
    whole = sample(logits, states)
    monkeypatch.setattr(sampler, "CHUNK_ELEMENTS", 3 * V)
    assert sample(logits, states) == whole


def test_end_tokens_are_banned_until_min_tokens_were_made():
    logits = torch.zeros(1, V)
    logits[0, 4] = 10
    params = SamplingParams(temperature=0, min_tokens=2)
    state = make_state(params, stop_ids=[4])
    assert sample(logits, [state])[0].token_id != 4
    state.append([0])
    assert sample(logits, [state])[0].token_id != 4
    state.append([0])
    assert sample(logits, [state])[0].token_id == 4


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-300),
        SamplingParams(temperature=100.0),
        SamplingParams(repetition_penalty=1e-300, temperature=0.5),
        SamplingParams(repetition_penalty=100.0, presence_penalty=-2, frequency_penalty=-2),
        SamplingParams(top_p=1e-300),
        SamplingParams(top_k=2**62),
        SamplingParams(min_p=1.0),
        SamplingParams(logit_bias=dict.fromkeys(range(V), -100.0)),
    ],
)
def test_extreme_options_still_give_a_token(params):
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(4)) * 30
    token = sample(logits, [make_state(params, generated=(5, 6))])[0].token_id
    assert 0 <= token < V
    if params.temperature < 1e-5 or params.top_p < 1e-5 or params.min_p == 1:
        assert token == int(logits.argmax())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_told_from_the_others(bad):
    logits = torch.zeros(3, V)
    logits[1, 3] = bad
    logits[2] = -math.inf
    for path in (None, *available()):
        ids, sound = argmax(logits, path)
        assert sound.tolist() == [True, False, False]
        assert ids[0] == 0


def test_a_row_whose_only_possible_token_is_banned_still_gives_one_of_the_vocabulary():
    logits = torch.full((1, V), -math.inf)
    logits[0, 4] = 1.0
    state = make_state(SamplingParams(temperature=1.0, min_tokens=2), stop_ids=[4])
    assert sample(logits, [state])[0].token_id == 4


def test_one_large_top_k_leaves_the_others_what_they_would_get_alone():
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(9))
    states = [make_state(SamplingParams(top_k=k, top_p=p), seed=k) for k, p in ((4000, 1.0), (5, 0.9), (0, 1.0))]
    together = sample(logits, states)
    assert together == [sample(logits[row : row + 1], [state])[0] for row, state in enumerate(states)]


def test_logprobs_are_those_of_the_unmodified_logits():
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(6))
    states = [
        make_state(SamplingParams(temperature=0, logprobs=5, logit_bias={9: 100.0}), name="a"),
        make_state(SamplingParams(temperature=0), name="b"),
        make_state(SamplingParams(temperature=0.5, logprobs=0, top_k=1), name="c"),
    ]
    first, second, third = sample(logits, states)
    exact = logits.double().log_softmax(-1)
    assert first.token_id == 9
    assert first.logprob.token_id == 9
    assert first.logprob.logprob == pytest.approx(float(exact[0, 9]), abs=1e-5)
    assert first.logprob.rank == 1 + int((logits[0] > logits[0, 9]).sum())
    assert [token for token, _ in first.logprob.top] == logits[0].topk(5).indices.tolist()
    assert [value for _, value in first.logprob.top] == pytest.approx(exact[0].topk(5).values.tolist(), abs=1e-5)
    assert second.logprob is None
    assert third.logprob.rank == 1
    assert third.logprob.top == []


def test_more_alternatives_than_the_vocabulary_has_are_cut():
    found = token_logprobs(torch.zeros(1, 3), [1], [20])
    assert sorted(token for token, _ in found[0].top) == [0, 1, 2]
    assert found[0].rank == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_draws_the_same_tokens_as_the_host():
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(8)) * 3
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_p=0.9, top_k=40),
        SamplingParams(temperature=0.7, min_p=0.05, repetition_penalty=1.2, presence_penalty=0.5),
    ]
    states = [make_state(kinds[row % 4], seed=row, generated=(5, 6)) for row in range(64)]
    here = [each.token_id for each in sample(logits, states)]
    there = [each.token_id for each in sample(logits.cuda(), states)]
    assert sum(a != b for a, b in zip(here, there, strict=True)) <= 1
