"""Chat templates: Jinja source that comes with a checkpoint, rendered in a sandbox the way its ecosystem expects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_serve.base.errors import CheckpointError, RequestError

# What an expression in a template can raise over a message it was not written for.
_RENDER_ERRORS = (
    TemplateError,
    LookupError,
    ArithmeticError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
)


class ChatTemplates:
    """The templates of one checkpoint by name; "default" is used unless tools are given and "tool_use" exists."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], origin: Path) -> None:
        environment = _environment()
        self._special_tokens = dict(special_tokens)
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template in {origin} is not valid: {error.message} (line {error.lineno})"
            ) from error

    def __bool__(self) -> bool:
        return bool(self._templates)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        options: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt text of a conversation. RequestError when there is no template or it refuses the messages."""
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            found = f" named default (there are: {', '.join(self._templates)})" if self._templates else ""
            raise RequestError(
                f"this model has no chat template{found}, so it cannot chat; use /v1/completions, or add "
                "chat_template.jinja to the model folder",
                param="messages",
            )
        variables: dict[str, object] = {**self._special_tokens, **(options or {})}
        variables |= {
            "messages": [joined_text(message) for message in messages],
            "tools": list(tools) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._templates[name].render(variables)
        except _RENDER_ERRORS as error:
            raise RequestError(f"the chat template refused the messages: {error}", param="messages") from error


def joined_text(message: Mapping[str, object]) -> dict[str, object]:
    """The message with a content of text parts made one string, a line per part: few templates take lists."""
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, list):
        texts = []
        for part in content:
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                raise RequestError("a message's content may hold text parts only", param="messages")
            texts.append(text)
        plain["content"] = "\n".join(texts)
    return plain


def _environment() -> ImmutableSandboxedEnvironment:
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
