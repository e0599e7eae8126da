"""The chat templates of a checkpoint: which one is used, and what becomes of a conversation that it cannot render.

Nothing of a template is run in this process; see text/rendering.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_serve.base.errors import CheckpointError, RequestError
from moe_serve.text.control_tokens import Marks
from moe_serve.text.rendering import BrokeDown, RenderProcess, TemplateSetup, TookTooLong

DEFAULT_SECONDS = 5.0
MAX_BYTES = 2**20
"""Of all templates of a folder; real ones have a few thousand."""
OPTION = "server option --chat-template-timeout"
PLAIN = ({"role": "user", "content": "hello"},)
TOOL = {"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object"}}}
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered conversation. Where control tokens are marked: `marked` with its `marks`, and which they are."""

    text: str
    marked: str = ""
    marks: Marks | None = None
    control_tokens: tuple[str, ...] = ()


class ChatTemplates:
    """The templates of one checkpoint by name; "default" is used unless tools are given and "tool_use" exists.

    They are rendered in two processes, the second for long conversations, so that short ones need not wait for them.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], origin: Path) -> None:
        self._origin = origin
        self._sources = dict(sources)
        if sum(map(len, sources.values())) > MAX_BYTES:
            raise CheckpointError(f"the chat template in {origin} has more than {MAX_BYTES} characters")
        self._special_tokens = dict(special_tokens)
        self.configure()

    def configure(
        self,
        *,
        seconds: float = DEFAULT_SECONDS,
        added_tokens: Iterable[tuple[str, bool]] | None = None,
        control_tokens: Sequence[str] | None = None,
    ) -> None:
        """As TemplateSetup has it. Before anything is rendered."""
        self._seconds = seconds
        setup = TemplateSetup(
            sources=self._sources,
            special_tokens=self._special_tokens,
            seconds=seconds,
            added_tokens=None if added_tokens is None else list(added_tokens),
            control_tokens=control_tokens,
        )
        self._short, self._long = RenderProcess(setup), RenderProcess(setup)

    def __bool__(self) -> bool:
        return bool(self._sources)

    def check(self) -> None:
        """Compile the templates and render a plain conversation, once at start. CheckpointError if that cannot be."""
        if not self:
            return
        try:
            self._short.start()
        except (TookTooLong, BrokeDown) as error:
            raise self._bad(f"cannot be compiled: {self._reason(error)}") from error
        for name, reason in self._short.broken.items():
            raise self._bad(f"is not valid: {reason}", name)
        for name, tools in (("default", None), ("tool_use", [TOOL])):
            if name in self._sources:
                self._try_plain(name, tools)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        options: Mapping[str, object] | None = None,
        long: bool = False,
    ) -> ChatPrompt:
        """The prompt of a conversation. RequestError when there is no template, or it refuses the messages or takes
        too long over them; CheckpointError for a template that is broken; Overloaded while others take too long."""
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            found = f" named default (there are: {', '.join(self._sources)})" if self._sources else ""
            raise RequestError(
                f"this model has no chat template{found}, so it cannot chat; use /v1/completions, or add "
                "chat_template.jinja to the model folder",
                param="messages",
            )
        job = {
            "template": name,
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
            "options": dict(options) if options else None,
        }
        return self._prompt(name, self._rendered(job, self._long if long else self._short))

    def close(self) -> None:
        """End the processes, whatever they do; the next conversation gets new ones."""
        self._short.close()
        self._long.close()

    def _rendered(self, job: Mapping[str, Any], process: RenderProcess) -> dict[str, Any]:
        try:
            return process.render(job)
        except (TookTooLong, BrokeDown) as error:
            raise RequestError(
                f"the chat template cannot render these messages: {self._reason(error)}", param="messages"
            ) from error

    def _prompt(self, name: str, answer: Mapping[str, Any]) -> ChatPrompt:
        if "broken" in answer:
            raise self._bad(f"is not valid: {answer['broken']}", name)
        if "refused" in answer:
            raise RequestError(answer["refused"], param="messages")
        if "marks" not in answer:
            return ChatPrompt(answer["text"])
        marks = Marks(*answer["marks"])
        return ChatPrompt(marks.removed(answer["text"]), answer["text"], marks, tuple(answer["control_tokens"]))

    def _try_plain(self, name: str, tools: Sequence[Mapping[str, object]] | None) -> None:
        """A plain conversation that is refused is no mistake by itself: a template may want other roles."""
        job = {"template": name, "messages": PLAIN, "tools": tools, "add_generation_prompt": True, "options": None}
        try:
            answer = self._short.render(job)
        except (TookTooLong, BrokeDown) as error:
            raise self._bad(f"cannot render a plain conversation: {self._reason(error)}", name) from error
        if "refused" in answer:
            log.warning("%s: %s (tried with one message of a user)", self._origin, answer["refused"])

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TookTooLong):
            return f"it takes longer than {self._seconds:g} s ({OPTION})"
        return str(error)

    def _bad(self, what: str, name: str = "default") -> CheckpointError:
        named = "" if name == "default" else f" {name}"
        return CheckpointError(f"the chat template{named} in {self._origin} {what}")
