"""In which form a chat template wants the content of messages, read off its syntax tree; and messages in that form.

A template that loops over a content wants parts, one that never does wants text, one that loops and asks whether the
content is a string takes either as it comes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jinja2 import nodes

from moe_serve.base.errors import RequestError

ContentForm = Literal["text", "parts", "either"]
SAME_ELEMENTS = {"list", "reverse", "sort", "unique", "trim", "default", "d"}
"""Filters that leave a content what it is, a text or a list."""
OVER_ELEMENTS = {"map", "select", "selectattr", "reject", "rejectattr"}
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names of the same thing; the first is the one that templates read."""


@dataclass(frozen=True, slots=True)
class ContentUse:
    """What a template does with contents. `asks_none`: it has words of its own for a message without one.

    `joins_arguments`: it puts the arguments of tool calls into a text as they are, so they must be text.
    """

    form: ContentForm
    asks_none: bool = False
    joins_arguments: bool = False

    def message(self, given: Mapping[str, object]) -> dict[str, object]:
        """A message as this template wants it. RequestError for parts that are no text where it wants text.

        Fields that are null are left out, since templates ask whether they are there; a missing content is an empty
        one; reasoning has the names that templates know.
        """
        message = {name: value for name, value in given.items() if value is not None}
        reasoning = next((message[name] for name in REASONING_FIELDS if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        message["content"] = self._content(given.get("content"))
        if self.joins_arguments and isinstance(calls := message.get("tool_calls"), list):
            message["tool_calls"] = [_with_arguments_as_text(call) for call in calls]
        return message

    def _content(self, content: object) -> object:
        if content is None:
            return None if self.asks_none else [] if self.form == "parts" else ""
        if self.form == "parts" and isinstance(content, str):
            return [{"type": "text", "text": content}]
        if self.form == "text" and isinstance(content, list):
            return joined_text(content)
        return content


def _with_arguments_as_text(call: object) -> object:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}}


def joined_text(parts: list[object]) -> str:
    """Text parts as one string, a line per part."""
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise RequestError("a message's content may hold text parts only", param="messages")
    return "\n".join(map(str, texts))


def content_use(template: nodes.Template) -> ContentUse:
    """What a parsed template does with contents."""
    contents = _Contents(template)
    loops = any(contents.has(loop.iter) for loop in template.find_all(nodes.For))
    loops |= any(each.name in OVER_ELEMENTS and contents.has(each.node) for each in template.find_all(nodes.Filter))
    loops |= any(contents.is_of_part(each) for each in template.find_all((nodes.Getitem, nodes.Getattr)))
    asked = {test.name for test in template.find_all(nodes.Test) if contents.has(test.node)}
    compared = any(
        contents.has(each.expr) and any(_constant(operand.expr, None) for operand in each.ops)
        for each in template.find_all(nodes.Compare)
    )
    form: ContentForm = "text" if not loops else "either" if "string" in asked else "parts"
    return ContentUse(form, asks_none="none" in asked or compared, joins_arguments=_joins_arguments(template))


def _joins_arguments(template: nodes.Template) -> bool:
    """Whether arguments are added to texts, and never asked what they are."""
    terms = [term for each in template.find_all(nodes.Add) for term in (each.left, each.right)]
    return any(map(_is_arguments, terms)) and not any(
        _is_arguments(test.node) for test in template.find_all(nodes.Test)
    )


def _is_arguments(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "arguments"
    return isinstance(node, nodes.Getitem) and _constant(node.arg, "arguments")


class _Contents:
    """Which expressions of a template are the content of a message: fields of that name and what is set to them."""

    def __init__(self, template: nodes.Template) -> None:
        self._names: set[str] = set()
        known = -1
        while known < len(self._names):  # until nothing new follows; each turn finds a name or is the last
            known = len(self._names)
            self._names |= {name for each in template.find_all(nodes.Assign) for name in self._assigned(each)}
            self._names |= {name for each in template.find_all(nodes.Macro) for name in self._passed(each, template)}

    def has(self, node: nodes.Node | None) -> bool:
        match node:
            case nodes.Name():
                return node.name in self._names
            case nodes.Getattr():
                return node.attr == "content"
            case nodes.Getitem():
                return _constant(node.arg, "content") or (isinstance(node.arg, nodes.Slice) and self.has(node.node))
            case nodes.Call():
                got = isinstance(node.node, nodes.Getattr) and node.node.attr == "get"
                return got and bool(node.args) and _constant(node.args[0], "content")
            case nodes.Filter():
                return node.name in SAME_ELEMENTS and self.has(node.node)
            case nodes.Or():
                return self.has(node.left) or self.has(node.right)
            case nodes.CondExpr():
                return self.has(node.expr1) or self.has(node.expr2)
        return False

    def is_of_part(self, node: nodes.Node) -> bool:
        """content[0].type, which no text has."""
        field = node.attr if isinstance(node, nodes.Getattr) else None
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            field = node.arg.value
        part = node.node if isinstance(node, nodes.Getattr | nodes.Getitem) else None
        numbered = isinstance(part, nodes.Getitem) and isinstance(part.arg, nodes.Const) and type(part.arg.value) is int
        return field in ("type", "text") and numbered and isinstance(part, nodes.Getitem) and self.has(part.node)

    def _assigned(self, node: nodes.Assign) -> list[str]:
        target = node.target
        return [target.name] if isinstance(target, nodes.Name) and self.has(node.node) else []

    def _passed(self, macro: nodes.Macro, template: nodes.Template) -> list[str]:
        """Parameters of a macro that somewhere get a content."""
        names = [name.name for name in macro.args]
        calls = [
            call
            for call in template.find_all(nodes.Call)
            if isinstance(call.node, nodes.Name) and call.node.name == macro.name
        ]
        placed = [name for call in calls for name, given in zip(names, call.args, strict=False) if self.has(given)]
        named = [given.key for call in calls for given in call.kwargs if self.has(given.value)]
        return placed + [name for name in named if name in names]


def _constant(node: nodes.Node, value: object) -> bool:
    return isinstance(node, nodes.Const) and node.value == value and type(node.value) is type(value)
