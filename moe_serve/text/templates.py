"""Chat templates compiled and rendered, in a sandbox and the way their ecosystem expects.

Lives in a process of its own (text/template_process.py), since a template may compute for ever: already compiling works
out what is constant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_serve.base.errors import RequestError
from moe_serve.text.content_form import ContentUse, content_use
from moe_serve.text.control_tokens import ControlTokens, Marks, control_tokens

# What an expression in a template can raise over a message it was not written for.
RENDER_ERRORS = (
    TemplateError,
    LookupError,
    ArithmeticError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
    AssertionError,
    MemoryError,
)
MAX_REASON = 500
MIN_CHARACTERS = 2**20
TIMES_CHARACTERS = 4
"""A template may write so many characters for each of the conversation, and MIN_CHARACTERS in any case."""


class Templates:
    """All templates of a checkpoint, out of a TemplateSetup as JSON."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self.seconds: float = setup["seconds"]
        self._special_tokens: dict[str, str] = setup["special_tokens"]
        self._added = None if setup["added_tokens"] is None else [tuple(each) for each in setup["added_tokens"]]
        self._named: list[str] | None = setup["control_tokens"]
        self._ready: dict[str, _Ready] = {}
        self._broken: dict[str, str] = {}
        for name, source in setup["sources"].items():
            try:
                self._ready[name] = self._compiled(source)
            except TemplateSyntaxError as error:
                self._broken[name] = f"{error.message} (line {error.lineno})"
            except RENDER_ERRORS as error:
                self._broken[name] = reason_of(error)

    @property
    def broken(self) -> dict[str, str]:
        """Why a template cannot be used, by its name."""
        return self._broken

    def render(self, body: bytes | str) -> dict[str, Any]:
        """The answer to a job: `text`, with its `marks` and `control_tokens`; why it was `refused`, or is `broken`."""
        try:
            job = json.loads(body)
            ready = self._ready.get(job["template"])
            if ready is None:
                return {"broken": self._broken[job["template"]]}
            marks = None if self._added is None else Marks.unused([_text(body), ready.source, *ready.control.tokens])
            limit = MIN_CHARACTERS + TIMES_CHARACTERS * len(body)
            text = _joined(ready.template, self._variables(job, ready, marks), limit=limit)
        except RequestError as error:
            return {"refused": str(error)}
        except RENDER_ERRORS as error:
            return {"refused": f"the chat template refused the messages: {reason_of(error)}"}
        if marks is None:
            return {"text": text}
        for mark in (marks.start, marks.end):  # where the template had JSON's escapes written
            text = text.replace(f"\\u{ord(mark):04x}", mark)
        return {"text": text, "marks": [marks.start, marks.end], "control_tokens": ready.control.tokens}

    def _compiled(self, source: str) -> _Ready:
        environment = sandbox()
        tree = environment.parse(source)
        control = control_tokens(tree, self._added or (), self._named)
        return _Ready(source, environment.from_string(source), content_use(tree), control)

    def _variables(self, job: Mapping[str, Any], ready: _Ready, marks: Marks | None) -> dict[str, Any]:
        messages: Sequence[Mapping[str, object]] = [ready.use.message(message) for message in job["messages"]]
        tools, options = job["tools"] or None, job["options"] or {}
        if marks is not None:
            messages = ready.control.mark_messages(messages, marks)
            tools, options = ready.control.mark(tools, marks), ready.control.mark(options, marks)
        return {
            **self._special_tokens,
            **options,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": job["add_generation_prompt"],
        }


class _Ready:
    """A compiled template and what its source tells."""

    __slots__ = ("control", "source", "template", "use")

    def __init__(self, source: str, template: Template, use: ContentUse, control: ControlTokens) -> None:
        self.source, self.template, self.use, self.control = source, template, use, control


def reason_of(error: BaseException) -> str:
    """What went wrong in a template, for people: short."""
    if isinstance(error, MemoryError):
        return "it needs more memory than a conversation may take"
    text = str(error) or type(error).__name__
    return text if len(text) <= MAX_REASON else text[:MAX_REASON] + "..."


def _joined(template: Template, variables: Mapping[str, Any], *, limit: int) -> str:
    """The rendered text; nothing more is rendered once it is too long."""
    pieces, size = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise RequestError(f"the chat template makes more than {limit} characters of these messages")
    return "".join(pieces)


def _text(body: bytes | str) -> str:
    return body if isinstance(body, str) else body.decode()


def sandbox() -> ImmutableSandboxedEnvironment:
    """What templates are compiled in."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationBlock(Extension):
    """{% generation %}...{% endgeneration %} marks answers for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter: no HTML escapes, and characters stay as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
