"""The process that renders: limits of time, memory and size, each the affair of one conversation; checks at start."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_serve.base.errors import CheckpointError, RequestError
from moe_serve.text.chat_template import ChatTemplates
from moe_serve.text.templates import Templates
from tests.support.chat_templates import CHATML, LOOPS, UNLESS_SLOW, answer_to, templates

HELLO = [{"role": "user", "content": "hello"}]
SLOW = [{"role": "user", "content": "slow"}]
TOO_MUCH_WORK = {
    "nested loops": LOOPS,
    "one long operation in C": "{{ 7 ** (messages[0].content | length * 9999999) % 3 }}",
}


@pytest.fixture
def made() -> Iterator[list[ChatTemplates]]:
    kept: list[ChatTemplates] = []
    yield kept
    for each in kept:
        each.close()


def chat(made: list[ChatTemplates], source: str, seconds: float = 0.3) -> ChatTemplates:
    chat = ChatTemplates({"default": source}, {}, Path("folder/chat_template.jinja"))
    chat.configure(seconds=seconds)
    made.append(chat)
    return chat


def pid_of(chat: ChatTemplates) -> int:
    child: Any = chat._short._child
    return int(child._process.pid)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_conversation_that_takes_too_long_is_ended_and_the_next_one_is_rendered(made: list[ChatTemplates]) -> None:
    templates = chat(made, UNLESS_SLOW)
    assert templates.render(HELLO).text == "hello"
    first = pid_of(templates)
    started = time.monotonic()
    with pytest.raises(RequestError, match=r"longer than 0\.3 s \(server option --chat-template-timeout\)") as caught:
        templates.render(SLOW)
    assert time.monotonic() - started < 5
    assert caught.value.param == "messages"
    assert templates.render(HELLO).text == "hello"
    assert pid_of(templates) != first
    assert not is_alive(first)


@pytest.mark.long
@pytest.mark.parametrize("source", TOO_MUCH_WORK.values(), ids=TOO_MUCH_WORK)
def test_a_template_that_never_ends_is_named_at_start(made: list[ChatTemplates], source: str) -> None:
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"chat template in folder/chat_template\.jinja cannot .*(longer|memory)"):
        chat(made, source).check()
    assert time.monotonic() - started < 10


def test_a_template_that_never_compiles_is_named_at_start(made: list[ChatTemplates]) -> None:
    with pytest.raises(CheckpointError, match="cannot be compiled: it takes longer than"):
        chat(made, "{{ 9 ** 999999999 }}").check()


def test_memory_has_a_limit(made: list[ChatTemplates]) -> None:
    templates = chat(made, "{{ 'abcdefgh' * (messages[0].content | length * 10 ** 9) }}", 5)
    with pytest.raises(RequestError, match="more memory than a conversation may take"):
        templates.render(HELLO)
    assert templates.render([{"role": "user", "content": ""}]).text == ""


def test_the_text_has_a_limit(made: list[ChatTemplates]) -> None:
    many = "{% for i in range(1000) %}{{ messages[0].content * 1000 }}{% endfor %}"
    with pytest.raises(RequestError, match="makes more than 104"):
        chat(made, many, 5).render([{"role": "user", "content": "ab"}])
    long = "x" * 3_000_000
    assert chat(made, CHATML, 5).render([{"role": "user", "content": long}]).text.count("x") == len(long)


@pytest.mark.long
def test_a_killed_process_is_replaced(made: list[ChatTemplates]) -> None:
    templates = chat(made, CHATML, 5)
    expected = templates.render(HELLO)
    os.kill(pid_of(templates), signal.SIGKILL)
    with pytest.raises(RequestError, match=r"its process ended \(SIGKILL\)"):
        templates.render(HELLO)
    assert templates.render(HELLO) == expected


@pytest.mark.long
def test_a_stopped_process_does_not_hold_its_parent(made: list[ChatTemplates], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_serve.text.rendering.GRACE_SECONDS", 0.2)
    templates = chat(made, CHATML)
    templates.render(HELLO)
    os.kill(pid_of(templates), signal.SIGSTOP)
    with pytest.raises(RequestError, match="longer than"):
        templates.render(HELLO)
    assert "hello" in templates.render(HELLO).text


@pytest.mark.long
def test_an_interrupted_conversation_leaves_no_answer_for_the_next(
    made: list[ChatTemplates], monkeypatch: pytest.MonkeyPatch
) -> None:
    templates = chat(made, CHATML, 5)
    templates.render(HELLO)

    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("moe_serve.text.rendering.receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            templates.render(SLOW)
    assert "hello" in templates.render(HELLO).text


@pytest.mark.long
def test_the_process_is_told_no_secrets(made: list[ChatTemplates], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_SERVE_API_KEY", "sesame")
    monkeypatch.setenv("HF_TOKEN", "sesame")
    templates = chat(made, CHATML, 5)
    templates.render(HELLO)
    environment = Path(f"/proc/{pid_of(templates)}/environ").read_bytes()
    assert b"PYTHONPATH=" in environment
    assert b"sesame" not in environment
    assert b"MOE_SERVE" not in environment


def test_the_process_ends_with_whoever_uses_it() -> None:
    templates = ChatTemplates({"default": CHATML}, {}, Path("x"))
    templates.render(HELLO)
    pid = pid_of(templates)
    del templates
    gc.collect()
    assert not is_alive(pid)


@pytest.mark.long
def test_the_process_does_not_outlive_a_killed_parent() -> None:
    script = (
        "from pathlib import Path; from moe_serve.text.chat_template import ChatTemplates; import threading, time\n"
        f"c = ChatTemplates({{'default': {UNLESS_SLOW!r}}}, {{}}, Path('x')); c.configure(seconds=0.6)\n"
        f"c.render({HELLO!r}); print(c._short._child._process.pid, flush=True)\n"
        f"threading.Thread(target=lambda: c.render({SLOW!r})).start(); time.sleep(0.1); print('busy', flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "busy\n"
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)
    parent.stdout.close()


@pytest.mark.parametrize("value", [{1, 2}, object(), b"x"])
def test_what_is_no_plain_data_is_refused(made: list[ChatTemplates], value: object) -> None:
    with pytest.raises(RequestError, match="must be plain data"):
        chat(made, CHATML).render([{"role": "user", "content": "x", "extra": value}])


@pytest.mark.long
def test_large_integers_and_broken_unicode_arrive(made: list[ChatTemplates]) -> None:
    source = "{{ messages[0].n }} {{ messages[0].content }}"
    assert chat(made, source, 5).render([{"role": "u", "content": "\ud800", "n": 10**30}]).text == f"{10**30} \ud800"


def test_a_template_that_refuses_a_plain_conversation_is_a_warning(
    made: list[ChatTemplates], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "moe_serve"):
        chat(made, "{{ raise_exception('a system message is needed') }}", 5).check()
    assert "a system message is needed" in caplog.text


def test_a_template_nested_too_deeply_is_named() -> None:
    for source in ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 5000 + "{% endif %}" * 5000):
        made = templates(source)
        assert made.broken["default"]
        assert "broken" in answer_to(made, HELLO)


def test_one_broken_template_leaves_the_others() -> None:
    sources = {"default": CHATML, "tool_use": "{% if %}"}
    made = Templates(
        {"sources": sources, "special_tokens": {}, "seconds": 1, "added_tokens": None, "control_tokens": None}
    )
    assert set(made.broken) == {"tool_use"}
    assert "hello" in answer_to(made, HELLO)["text"]
