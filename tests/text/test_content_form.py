"""Which form of content a template gets, and that texts are those of transformers on the same template."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moe_serve.text.content_form import content_use
from moe_serve.text.templates import RENDER_ERRORS, sandbox
from tests.support.chat_templates import (
    ASKS_NONE,
    CHATML,
    CONVERSATIONS,
    FAMILIES,
    HEADERS,
    TOOLS,
    VISION_PARTS,
    Messages,
    answer_to,
    call,
    rendered,
    templates,
)
from tests.support.tokenizer_folders import write_folder

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
REFUSED = "refused"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": None, **SPECIAL}
    folder: Path = write_folder(tmp_path_factory.mktemp("oracle"), "sentence_pieces", config=config)
    return transformers.AutoTokenizer.from_pretrained(folder)


def theirs(oracle: Any, source: str, messages: Messages, **options: Any) -> str:
    given: Any = copy.deepcopy(list(messages))
    try:
        return str(oracle.apply_chat_template(given, chat_template=source, tokenize=False, **options))
    except RENDER_ERRORS:
        return REFUSED


def ours(source: str, messages: Messages, **job: Any) -> str:
    answer = answer_to(templates(source, special_tokens=SPECIAL), messages, **job)
    assert ("text" in answer) != ("refused" in answer)
    return str(answer["text"]) if "text" in answer else REFUSED


def in_parts(messages: Messages) -> list[dict[str, Any]]:
    """Each text cut in two parts."""

    def parts(text: str) -> list[dict[str, str]]:
        middle = len(text) // 2
        return [{"type": "text", "text": text[:middle]}, {"type": "text", "text": text[middle:]}] if text else []

    return [{**message, "content": parts(message["content"])} for message in messages]


def as_one_part(messages: Messages) -> list[dict[str, Any]]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def joined(messages: Messages) -> list[dict[str, Any]]:
    return [{**message, "content": "\n".join(part["text"] for part in message["content"])} for message in messages]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_form_is_read_off_the_template(family: str) -> None:
    form, source = FAMILIES[family]
    use = content_use(sandbox().parse(source))
    assert use.form == form
    assert use.asks_none == use.joins_arguments == (source == ASKS_NONE)


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", "parts"),
        (
            "{% for m in messages %}{% set c = m['content'] %}{% for p in c %}{{ p.text }}{% endfor %}{% endfor %}",
            "parts",
        ),
        ("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", "parts"),
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", "parts"),
        ("{% for m in messages %}{{ m.content | map(attribute='text') | join }}{% endfor %}", "parts"),
        ("{% for m in messages %}{% for p in m.content[1:] %}{{ p.text }}{% endfor %}{% endfor %}", "parts"),
        ("{% for m in messages %}{% for p in m.content or [] %}{{ p.text }}{% endfor %}{% endfor %}", "parts"),
        ("{% macro f(x) %}{% for p in x %}{{ p.text }}{% endfor %}{% endmacro %}{{ f(messages[0].content) }}", "parts"),
        (
            "{% macro f(x) %}{% for p in x %}{{ p.text }}{% endfor %}{% endmacro %}{{ f(x=messages[0].content) }}",
            "parts",
        ),
        ("{{ messages[0].content[0].isupper() }}", "text"),
        ("{{ messages[0].content[:100] }}", "text"),
        ("{% for word in messages[0].content.split() %}{{ word }}{% endfor %}", "text"),
        ("{% for m in messages %}{% for c in m.tool_calls %}{{ c }}{% endfor %}{{ m.content }}{% endfor %}", "text"),
    ],
)
def test_a_content_is_followed_through_names_and_macros(source: str, form: str) -> None:
    assert content_use(sandbox().parse(source)).form == form


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("start", [True, False])
def test_texts_are_those_of_transformers(oracle: Any, family: str, name: str, start: bool) -> None:
    form, source = FAMILIES[family]
    messages = CONVERSATIONS[name]
    wanted = as_one_part(messages) if form == "parts" else messages
    expected = theirs(oracle, source, wanted, add_generation_prompt=start)
    assert ours(source, messages, add_generation_prompt=start) == expected
    assert expected == REFUSED or "hello" in expected or name != "one turn"


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_reach_a_template_in_the_form_it_wants(oracle: Any, family: str) -> None:
    form, source = FAMILIES[family]
    messages = in_parts(CONVERSATIONS["several turns"])
    wanted = joined(messages) if form == "text" else messages
    assert ours(source, messages) == theirs(oracle, source, wanted, add_generation_prompt=True)


@pytest.mark.parametrize("family", ["thinking", "headers", "xml tools"])
def test_tools_and_variables_reach_a_template_as_in_transformers(oracle: Any, family: str) -> None:
    source, messages = FAMILIES[family][1], CONVERSATIONS["a tool's answer"]
    expected = theirs(oracle, source, messages, tools=TOOLS, add_generation_prompt=True, enable_thinking=False)
    assert ours(source, messages, tools=TOOLS, options={"enable_thinking": False}) == expected
    assert expected != REFUSED


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("content", [{}, {"content": None}], ids=["left out", "null"])
def test_no_content_beside_tool_calls_is_an_empty_one(oracle: Any, family: str, content: Mapping[str, None]) -> None:
    form, source = FAMILIES[family]
    messages = [
        {"role": "user", "content": "look"},
        {"role": "assistant", "tool_calls": [call(word="x")], "name": None, "refusal": None, **content},
        {"role": "tool", "content": "found"},
    ]
    empty: Any = [] if form == "parts" else ""
    wanted = [{**messages[0]}, {"role": "assistant", "tool_calls": [call(word="x")], "content": empty}, messages[2]]
    if form == "parts":
        wanted = [*as_one_part([wanted[0]]), wanted[1], *as_one_part([wanted[2]])]
    found = ours(source, messages)
    assert found != REFUSED or theirs(oracle, source, wanted) == REFUSED
    if source == ASKS_NONE:  # it has words of its own for that
        assert found.endswith('<|tool_call|>look_up<|sep|>{"word": "x"}</s><|tool_output|>found<|Assistant|>')
    else:
        assert found == theirs(oracle, source, wanted, add_generation_prompt=True)
    assert "None" not in found


def test_fields_that_are_null_are_not_there() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": None}]
    assert "b<|eot_id|>" in rendered(HEADERS, messages)


def test_a_template_for_parts_says_what_the_user_wrote() -> None:
    found = rendered(VISION_PARTS, [{"role": "user", "content": "see me"}])
    assert found == "USER: see me \nASSISTANT:"


def test_parts_that_are_no_text_are_refused_where_text_is_wanted() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    assert "text parts only" in rendered(CHATML, [{"role": "user", "content": [image]}])


def test_the_templates_of_the_tests_differ() -> None:
    assert len({ours(source, CONVERSATIONS["one turn"]) for _, source in FAMILIES.values()}) > 8
