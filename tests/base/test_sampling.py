"""What sampling options may be, and what n choices are made of."""

from __future__ import annotations

import math

import msgspec
import pytest

from moe_serve.base.errors import RequestError
from moe_serve.base.sampling import SamplingParams

NAN, INFINITY = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n", value) for value in (0, -1, 129)),
        *(("temperature", value) for value in (-0.1, 101, NAN, INFINITY)),
        *(("top_p", value) for value in (0, -1, 1.1, NAN)),
        *(("top_k", value) for value in (-2, NAN)),
        *(("min_p", value) for value in (-0.1, 1.1, NAN)),
        *(("seed", value) for value in (2**63, -(2**63) - 1)),
        *(("presence_penalty", value) for value in (-2.1, 2.1, NAN)),
        *(("frequency_penalty", value) for value in (-2.1, 2.1, NAN)),
        *(("repetition_penalty", value) for value in (0, -1, INFINITY, NAN)),
        *(("logit_bias", value) for value in ({1: 101}, {1: -101}, {1: NAN})),
        *(("stop", value) for value in (("",), ("a", ""))),
        *(("max_tokens", value) for value in (0, -1)),
        *(("min_tokens", value) for value in (-1, 17)),
        *(("logprobs", value) for value in (-1, 21)),
        *(("prompt_logprobs", value) for value in (-1, 21)),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name


def test_a_message_says_what_is_allowed_and_what_was_given() -> None:
    with pytest.raises(RequestError, match=r"top_p must be greater than 0 and at most 1, not 1\.5"):
        SamplingParams(top_p=1.5)


def test_limits_themselves_are_allowed() -> None:
    SamplingParams(n=128, temperature=0, top_p=1, top_k=-1, min_p=1, seed=-(2**63), presence_penalty=-2, min_tokens=16)
    SamplingParams(max_tokens=None, min_tokens=10**6, logprobs=20, prompt_logprobs=0, logit_bias={0: -100})


def test_choices_are_single_and_have_seeds_in_a_row() -> None:
    assert [choice.seed for choice in SamplingParams(n=3, seed=7).choices()] == [7, 8, 9]
    assert [choice.seed for choice in SamplingParams(n=2, seed=2**63 - 1).choices()] == [2**63 - 1, -(2**63)]
    assert [choice.seed for choice in SamplingParams(n=2).choices()] == [None, None]
    assert {choice.n for choice in SamplingParams(n=3, temperature=0.5).choices()} == {1}
    assert {choice.temperature for choice in SamplingParams(n=3, temperature=0.5).choices()} == {0.5}


def test_a_record_survives_the_wire_and_is_checked_there_too() -> None:
    params = SamplingParams(n=2, stop=("a",), logit_bias={5: 1.5}, stop_token_ids=(1, 2), seed=-1, max_tokens=None)
    packed = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(packed, type=SamplingParams) == params
    with pytest.raises(msgspec.ValidationError, match="temperature"):
        msgspec.msgpack.decode(msgspec.msgpack.encode({"temperature": -1}), type=SamplingParams)


def test_temperature_zero_is_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=1e-9).greedy
