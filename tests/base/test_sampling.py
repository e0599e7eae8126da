"""Sampling params are checked when they are made, and split into single generations."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from moe_serve.base.errors import RequestError
from moe_serve.base.sampling import SamplingParams, with_defaults


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", 1.5),
        ("n", True),
        ("n", None),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", None),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 2.5),
        ("min_p", 1.5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", 1.0),
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("min_tokens", -1),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("logit_bias", {5: 101.0}),
        ("stop", ("",)),
        ("stop", (5,)),
        ("stop", 5),
        ("stop", {"a": 1}),
        ("stop_token_ids", 5),
        ("stop_token_ids", "5"),
        ("stop_token_ids", (1.0,)),
        ("stop_token_ids", (True,)),
        ("logit_bias", [(5, 1.0)]),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: "1"}),
        ("logit_bias", {5: None}),
        ("ignore_eos", 1),
        ("skip_special_tokens", None),
        ("include_stop_str_in_output", "yes"),
        ("stop_token_ids", tuple(range(1025))),
    ],
)
def test_what_cannot_be_is_refused_under_its_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    "edge",
    [
        {"n": 128},
        {"temperature": 0},
        {"temperature": 100},
        {"top_p": 1},
        {"top_k": -1},
        {"min_p": 1},
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
        {"max_tokens": None, "min_tokens": 10**6},
        {"logprobs": 0},
        {"logprobs": 20},
        {"logit_bias": {1: -100.0, 2: 100.0}},
    ],
    ids=str,
)
def test_the_edges_are_allowed(edge: dict[str, Any]) -> None:
    made = SamplingParams(**edge)
    assert {name: getattr(made, name) for name in edge} == edge


def test_more_min_tokens_than_max_tokens_are_refused() -> None:
    with pytest.raises(RequestError, match="min_tokens must be at least 0 and at most 8, not 9"):
        SamplingParams(min_tokens=9, max_tokens=8)


def test_one_stop_string_is_not_taken_letter_by_letter() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]


def test_n_choices_have_seeds_of_their_own_that_wrap_at_the_end() -> None:
    assert [choice.seed for choice in SamplingParams(n=3, seed=7).choices()] == [7, 8, 9]
    assert [choice.seed for choice in SamplingParams(n=2, seed=2**63 - 1).choices()] == [2**63 - 1, -(2**63)]
    assert [choice.seed for choice in SamplingParams(n=2).choices()] == [None, None]
    assert [choice.n for choice in SamplingParams(n=3).choices()] == [1, 1, 1]


def test_a_single_choice_is_the_params_themselves() -> None:
    params = SamplingParams(seed=3)
    assert params.choices() == [params]


def test_params_travel_between_processes_unchanged() -> None:
    params = SamplingParams(temperature=0.5, logit_bias={3: 1.5}, stop=("a", "b"), max_tokens=None, seed=-5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_temperature_zero_is_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=0.01).greedy


def test_numbers_of_other_libraries_become_pythons_own_and_travel() -> None:
    params = SamplingParams(
        n=np.int64(2),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_p=np.int8(1),
        max_tokens=np.uint16(7),  # type: ignore[arg-type]
        stop_token_ids=[np.int32(3)],  # type: ignore[arg-type]
        logit_bias={np.int64(4): np.float64(1.5)},  # type: ignore[dict-item]
    )
    plain = SamplingParams(n=2, temperature=0.5, top_p=1, max_tokens=7, stop_token_ids=(3,), logit_bias={4: 1.5})
    assert msgspec.msgpack.encode(params) == msgspec.msgpack.encode(plain)
    assert params == plain


def test_none_means_none_of_them() -> None:
    empty = SamplingParams(stop=None, stop_token_ids=None, logit_bias=None)  # type: ignore[arg-type]
    assert empty == SamplingParams()


def test_lists_may_be_given_for_tuples() -> None:
    given = SamplingParams(stop=["a", "b"], stop_token_ids=[1, 2])  # type: ignore[arg-type]
    assert given == SamplingParams(stop=("a", "b"), stop_token_ids=(1, 2))


def test_defaults_of_a_checkpoint_count_where_nothing_was_given() -> None:
    defaults = {"temperature": 0.25, "top_k": 9.0, "repetition_penalty": 1.1}
    params = with_defaults(defaults, top_k=3, max_tokens=5)
    assert params == SamplingParams(temperature=0.25, top_k=3, repetition_penalty=1.1, max_tokens=5)
    assert with_defaults(defaults).top_k == 9
    assert with_defaults({}) == SamplingParams()
