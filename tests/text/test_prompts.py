"""What a Python caller may give as prompts, params and conversations, and how what is wrong is named."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_serve.base.errors import ContextTooLong, RequestError
from moe_serve.base.sampling import SamplingParams
from moe_serve.text.prompts import GivenPrompt, as_conversations, as_params, as_prompts, naming

TEXT, IDS = GivenPrompt("hi", None), GivenPrompt(None, [1, 2])
MESSAGE = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hi", [TEXT]),
        (["hi"], [TEXT]),
        (("hi", "hi"), [TEXT, TEXT]),
        ({"prompt": "hi"}, [TEXT]),
        ([{"prompt": "hi"}], [TEXT]),
        ({"prompt": "hi", "prompt_token_ids": None, "multi_modal_data": None}, [TEXT]),
        ({"prompt_token_ids": [1, 2]}, [IDS]),
        ([{"prompt_token_ids": (1, 2)}, "hi"], [IDS, TEXT]),
        ({"prompt_token_ids": np.array([1, 2]), "prompt": None}, [IDS]),
        ({"prompt_token_ids": [1, 2], "prompt": "hi"}, [GivenPrompt("hi", [1, 2])]),
        ([1, 2], [IDS]),
        ((1, 2), [IDS]),
        (range(1, 3), [IDS]),
        (iter([1, 2]), [IDS]),
        ([np.int64(1), np.uint8(2)], [IDS]),
        (np.array([1, 2], dtype=np.uint16), [IDS]),
        (torch.tensor([1, 2]), [IDS]),
        (np.array([[1, 2], [1, 2]]), [IDS, IDS]),
        ([torch.tensor([1, 2]), [1, 2]], [IDS, IDS]),
        ([[1, 2], "hi", {"prompt": "hi"}], [IDS, TEXT, TEXT]),
        (("hi" for _ in range(2)), [TEXT, TEXT]),
        ({"a": "hi"}.values(), [TEXT]),
        ([], []),
        ([[]], [GivenPrompt(None, [])]),
        ("", [GivenPrompt("", None)]),
    ],
    ids=repr,
)
def test_prompts_in_every_form(given: object, expected: list[GivenPrompt]) -> None:
    found = as_prompts(given)
    assert found == expected
    assert all(type(token_id) is int for prompt in found for token_id in prompt.token_ids or [])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "prompts must be a text, token ids, or a dict with prompt or prompt_token_ids, or a list of them"),
        (5, "not 5"),
        (b"hi", "not b'hi'"),
        ({"hi"}, "not {'hi'}"),
        (["hi", None], r"prompts\[1\] must be a text"),
        (["hi", b"hi"], r"prompts\[1\]"),
        (["hi", 5], "prompts mix token ids with 'hi'"),
        ([5, "hi"], "prompts mix token ids with 'hi'"),
        ([True, False], r"prompts\[0\] .* not True"),
        ([[1, True]], r"prompts\[0\] must be token ids, not True \(at place 1\)"),
        ([[1], [1, 2.0]], r"prompts\[1\] must be token ids, not 2.0 \(at place 1\)"),
        ([["hi"]], r"prompts\[0\] must be token ids, not 'hi'"),
        (np.array([0.5]), r"prompts\[0\]"),
        ({}, "prompts must have prompt or prompt_token_ids"),
        ([{}], r"prompts\[0\] must have prompt or prompt_token_ids"),
        (["hi", {"text": "hi"}], r"prompts\[1\] has 'text'"),
        ([{"prompt": "hi", "multi_modal_data": {"image": 1}}], r"prompts\[0\] has 'multi_modal_data'"),
        ([{"prompt": [1, 2]}], r"prompts\[0\]: prompt must be a text, not \[1, 2\]"),
        ([{"prompt_token_ids": "hi"}], r"prompts\[0\]: prompt_token_ids must be token ids, not 'hi'"),
        ([{"prompt_token_ids": [1.5]}], r"prompts\[0\]: prompt_token_ids must be token ids, not 1.5"),
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_named_with_its_place(given: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        as_prompts(given)


ITEMS: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.sampled_from(["prompt", "prompt_token_ids", "x"]), inner, max_size=2)
    ),
    max_leaves=6,
)


@given(ITEMS)
def test_anything_is_prompts_or_a_request_error(value: object) -> None:
    for parse in (as_prompts, as_conversations):
        with contextlib.suppress(RequestError):
            parse(value)


DEFAULT, OWN = SamplingParams(temperature=0.5), SamplingParams(max_tokens=3)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [DEFAULT, DEFAULT]),
        (OWN, [OWN, OWN]),
        ([OWN, None], [OWN, DEFAULT]),
        ((OWN, OWN), [OWN, OWN]),
        ((each for each in (None, OWN)), [DEFAULT, OWN]),
    ],
    ids=repr,
)
def test_params_for_all_or_for_each(given: object, expected: list[SamplingParams]) -> None:
    assert as_params(given, 2, DEFAULT) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([OWN], "1 sampling params for 2 prompts"),
        ([], "0 sampling params for 2 prompts"),
        ([OWN, OWN, OWN], "3 sampling params for 2 prompts"),
        ([OWN, {"max_tokens": 3}], r"params\[1\] must be SamplingParams or None, not \{'max_tokens': 3\}"),
        ({"max_tokens": 3}, "params must be SamplingParams, None, or a list"),
        ("greedy", "not 'greedy'"),
        (5, "not 5"),
        (SamplingParams, "not <class"),
    ],
    ids=repr,
)
def test_wrong_params_are_named(given: object, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        as_params(given, 2, DEFAULT)
    assert caught.value.param == "params"


def test_conversations_one_or_several_in_any_sequence() -> None:
    assert as_conversations([MESSAGE]) == [[MESSAGE]]
    assert as_conversations(each for each in [MESSAGE, MESSAGE]) == [[MESSAGE, MESSAGE]]
    assert as_conversations([[MESSAGE], (MESSAGE, MESSAGE)]) == [[MESSAGE], [MESSAGE, MESSAGE]]
    assert as_conversations([]) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("hi", r"messages\[0\] must be a list of messages with role and content, not 'hi'"),
        (MESSAGE, "must be a list of messages"),
        (None, "not None"),
        (["hi"], r"messages\[0\] must be a list"),
        ([[]], r"messages\[0\] must be a list of messages"),
        ([[MESSAGE], []], r"messages\[1\] must be"),
        ([MESSAGE, "hi"], r"messages\[1\] must be a message"),
        ([[MESSAGE], MESSAGE], r"messages\[1\] must be a list"),
        ([[MESSAGE], [MESSAGE, 5]], r"messages\[1\]\[1\] must be a message with role and content, not 5"),
    ],
    ids=repr,
)
def test_what_is_no_conversation_is_named_with_its_place(given: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        as_conversations(given)


def test_a_named_error_keeps_its_class() -> None:
    with pytest.raises(ContextTooLong, match=r"^prompts\[3\]: too long$") as caught, naming("prompts[3]"):
        raise ContextTooLong("too long")
    assert caught.value.param == "prompts[3]"
