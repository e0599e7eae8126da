"""Loading a folder's tokenizer and its chat templates; the sandbox; what is missing or broken is named."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pytest

from moe_serve.base.errors import CheckpointError, RequestError
from moe_serve.text.tokenizer import Tokenizer
from tests.support.rendering import RendersHere
from tests.support.tokenizer_folders import CHAT_TEMPLATE, TURN_END, write_folder

HELLO = [{"role": "user", "content": "hello"}]
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ (messages|attr('__class__')).__init__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ '{0.__class__.__init__}'.format(messages) }}",
    "{{ '{m.__class__.__init__}'.format_map({'m': messages}) }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ self.__init__.__globals__ }}",
    "{% set x = joiner.__init__.__globals__.__builtins__.open('/etc/passwd').read() %}{{ x }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_serve.text.chat_template.RenderProcess", RendersHere)


def render(folder: Path, **options: object) -> str:
    return Tokenizer(folder).render_chat(HELLO, **options)  # type: ignore[arg-type]


def test_the_template_in_tokenizer_config_is_used(tmp_path: Path) -> None:
    write_folder(tmp_path)
    expected = f"<|im_start|>user\nhello{TURN_END}\n"
    assert render(tmp_path) == expected + "<|im_start|>assistant\n"
    assert render(tmp_path, add_generation_prompt=False) == expected


def test_a_template_file_wins_over_tokenizer_config(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    assert render(tmp_path) == f"hello{TURN_END}"


def test_named_templates_choose_the_one_for_tools(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | tojson }}"},
    ]
    write_folder(tmp_path, config={"chat_template": named})
    assert render(tmp_path) == "plain"
    assert render(tmp_path, tools=[{"type": "function"}]) == '[{"type": "function"}]'


def test_special_tokens_written_as_objects_reach_the_template(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "chat_template": "{{ bos_token }}|"}
    write_folder(tmp_path, config=config)
    assert render(tmp_path) == "<s>|"


def test_a_template_gets_the_options_of_the_request(tmp_path: Path) -> None:
    write_folder(tmp_path, chat_template="{{ enable_thinking }} {{ messages | length }}")
    assert render(tmp_path, options={"enable_thinking": False, "messages": []}) == "False 1"


def test_content_in_parts_becomes_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    rendered = Tokenizer(write_folder(tmp_path)).render_chat([{"role": "user", "content": parts}])
    assert "user\none\ntwo" in rendered


@pytest.mark.parametrize("source", ESCAPES)
def test_a_malicious_template_reaches_nothing(tmp_path: Path, source: str) -> None:
    write_folder(tmp_path, chat_template=source)
    try:
        rendered = render(tmp_path)
    except (RequestError, CheckpointError):
        return
    assert not rendered, "what is out of reach is refused or renders as nothing"


def test_the_sandbox_test_can_fail(tmp_path: Path) -> None:
    environment = jinja2.Environment()
    shown = [source for source in ESCAPES[:8] if _renders(environment, source)]
    assert len(shown) >= 5, "without a sandbox these templates reach Python's insides"


def _renders(environment: jinja2.Environment, source: str) -> str:
    try:
        return environment.from_string(source).render(messages=HELLO, raise_exception=render)
    except jinja2.TemplateError:
        return ""


def test_a_template_cannot_change_what_it_is_given(tmp_path: Path) -> None:
    write_folder(tmp_path, chat_template="{{ messages.append(1) }}")
    with pytest.raises(RequestError, match="refused"):
        render(tmp_path)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content }}", "refused"),
        ("{{ messages[0].content + 1 }}", "refused"),
        ("{{ 1 / 0 }}", "refused"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refused"),
        ("{{ range(1000000000) | length }}", "refused"),
    ],
)
def test_what_a_template_refuses_is_the_clients_error(tmp_path: Path, source: str, words: str) -> None:
    write_folder(tmp_path, chat_template=source)
    with pytest.raises(RequestError, match=words) as caught:
        render(tmp_path)
    assert caught.value.param == "messages"


def test_a_model_without_template_says_how_to_go_on(tmp_path: Path) -> None:
    write_folder(tmp_path, chat_template=None)
    with pytest.raises(RequestError, match=r"no chat template.*v1/completions.*chat_template\.jinja"):
        render(tmp_path)


@pytest.mark.parametrize("given", [5, [1], [{"name": "default"}], {"default": 5}])
def test_a_template_of_the_wrong_form_is_named(tmp_path: Path, given: object) -> None:
    write_folder(tmp_path, config={"chat_template": given})
    with pytest.raises(CheckpointError, match=r"chat_template in .*tokenizer_config\.json"):
        Tokenizer(tmp_path)


def test_a_template_that_is_no_jinja_is_named_with_its_line(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("\n{% if %}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not valid: .*line 2"):
        Tokenizer(tmp_path).chat_templates.check()
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not valid: .*line 2"):
        render(tmp_path)


def test_a_template_file_too_large_to_be_one_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x" * (2**20 + 1))
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja has more than 1048576 characters"):
        Tokenizer(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 5}', b"\xff\xfe", b"[" * 100_000])
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    write_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_broken_tokenizer_config_is_named(tmp_path: Path, content: bytes) -> None:
    write_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer(tmp_path)


def test_a_folder_without_tokenizer_config_still_encodes(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert tokenizer.eos_token is None


def test_cutting_and_filling_of_the_training_are_off(tmp_path: Path) -> None:
    write_folder(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    values["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a")) == "a"
    assert tokenizer.decode(tokenizer.encode("one two three four")) == "one two three four"


def test_a_bos_is_added_where_the_tokenizer_says_so(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer(write_folder(tmp_path, "sentence_pieces", config=config))
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 1
    assert tokenizer.encode("a", add_special_tokens=False)[0] != 1
    assert tokenizer.eos_token_id == 2


def test_lone_surrogates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        Tokenizer(write_folder(tmp_path)).encode("a\ud800")


@pytest.mark.parametrize("kind", ["byte_level", "sentence_pieces"])
def test_transformers_reads_the_same_folder_the_same_way(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None} if kind == "sentence_pieces" else {}
    write_folder(tmp_path, kind, config={"tokenizer_class": "PreTrainedTokenizerFast", **names})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path)
    for text in ("In the beginning", " two  blanks ", "Größe 北京 🙃", f"one{TURN_END}two"):
        assert ours.encode(text) == theirs(text)["input_ids"]
    conversation = [*HELLO, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "so?"}]
    expected = theirs.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(conversation) == expected
    assert CHAT_TEMPLATE


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_brackets_without_end_are_a_sentence(tmp_path: Path, file: str) -> None:
    deep = "[" * 200_000
    for text in (deep, deep + "]" * 200_000, f'{{"added_tokens": {deep}'):
        write_folder(tmp_path)
        (tmp_path / file).write_text(text)
        with pytest.raises(CheckpointError, match=file.replace(".", r"\.")) as caught:
            Tokenizer(tmp_path)
        assert len(str(caught.value)) < 400 + len(str(tmp_path))
