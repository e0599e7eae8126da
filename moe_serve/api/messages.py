"""Chat messages and tools of a request: checked by hand, so that an error names the place, and made template-ready."""

from __future__ import annotations

import json

from moe_serve.base.errors import RequestError


def checked_messages(value: object) -> object:
    """`messages` as chat templates want them: arguments of tool calls as objects. None stays None."""
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise RequestError("messages must be a non-empty list of objects with role and content", param="messages")
    return [_message(message, f"messages.{place}") for place, message in enumerate(value)]


def checked_tools(value: object) -> object:
    """`tools`: function tools only."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise RequestError("tools must be a list", param="tools")
    for place, tool in enumerate(value):
        if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
            raise RequestError(f"tools.{place} must be an object with type function and a function", param="tools")
    return value


def _message(message: object, place: str) -> dict[str, object]:
    if not isinstance(message, dict):
        raise RequestError(f"{place} must be an object with role and content", param=place)
    if not isinstance(message.get("role"), str):
        raise RequestError(f"{place}.role must be a string", param=f"{place}.role")
    content = message.get("content")
    if isinstance(content, list):
        for number, part in enumerate(content):
            _check_part(part, f"{place}.content.{number}")
    elif content is None:
        if not message.get("tool_calls"):
            raise RequestError(f"{place}.content is required", param=f"{place}.content")
    elif not isinstance(content, str):
        raise RequestError(f"{place}.content must be a string or a list of text parts", param=f"{place}.content")
    plain = dict(message)
    if plain.get("tool_calls") is not None:
        plain["tool_calls"] = _tool_calls(plain["tool_calls"], f"{place}.tool_calls")
    return plain


def _check_part(part: object, place: str) -> None:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise RequestError(f"{place} must be of type text; this model reads nothing else", param=place)
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{place}.text must be a string", param=f"{place}.text")


def _tool_calls(value: object, place: str) -> list[dict[str, object]]:
    """Calls with their arguments as objects: OpenAI sends them as JSON text, templates write them out themselves."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise RequestError(f"{place} must be a list of objects", param=place)
    calls = []
    for call in value:
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function = {**function, "arguments": _arguments(function["arguments"])}
        calls.append({**call, "function": function})
    return calls


def _arguments(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # a model may have written something else; the template shows it as it is
