"""Control tokens in what a client wrote: marked before a chat template is rendered, told apart in what it wrote.

Control tokens are a tokenizer's special tokens and those added tokens that the template itself writes. A whole one in a
client's text stands between two marks afterwards. Where a beginning of one could be made whole by what the template
puts next to it, a single mark keeps the two apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import nodes

from moe_serve.base.errors import RequestError

WORD = re.compile(r"\w+\Z")
ROLE = re.compile(r"[\w-]{1,64}\Z")
FIRST_MARK, LAST_MARK = 0xE000, 0xF8FF  # characters that mean nothing by themselves


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a rendered text. `written`: a client's control token, to be read as ordinary text."""

    text: str
    written: bool


@dataclass(frozen=True, slots=True)
class Marks:
    """Two characters that occur neither in a conversation nor in its template."""

    start: str
    end: str

    @classmethod
    def unused(cls, texts: Sequence[str]) -> Marks:
        """RequestError if a client used all that there are. The texts may have them escaped as JSON does."""
        used = {ord(char) for text in texts for char in re.findall("[\ue000-\uf8ff]", text)}
        used |= {int(digits, 16) for text in texts for digits in re.findall(r"\\u([ef][0-9a-f]{3})", text, re.I)}
        free = [code for code in range(FIRST_MARK, LAST_MARK + 1) if code not in used][:2]
        if len(free) < 2:
            raise RequestError("the messages use all of Unicode's private characters U+E000 to U+F8FF; send fewer")
        return cls(*map(chr, free))

    def pieces(self, text: str, tokens: Iterable[str]) -> Iterator[Piece]:
        """A rendered text in order; single marks, as a template that cuts texts leaves them, are dropped."""
        parts = re.split(f"{self.start}({_one_of(tokens)}){self.end}|[{self.start}{self.end}]", text)
        for place, part in enumerate(parts):
            if part:
                yield Piece(part, written=bool(place % 2))

    def removed(self, text: str) -> str:
        return text.replace(self.start, "").replace(self.end, "")


class ControlTokens:
    """Those of one template. `literals` are all texts that the template holds, between which a client's may stand."""

    def __init__(self, tokens: Iterable[str], literals: Iterable[str]) -> None:
        self.tokens = tuple(sorted({token for token in tokens if token}, key=len, reverse=True))
        self._whole = re.compile(_one_of(self.tokens))
        self._firsts = re.compile(_one_of({token[0] for token in self.tokens}))
        self._literals = tuple({literal for literal in literals if literal and not literal.isspace()})
        self._beginnings = {token[:size] for token in self.tokens for size in range(1, len(token))}
        rests = self._find_rests()
        self._rest = re.compile(f"(?={_one_of({rest[0] for rest in rests})})(?={_one_of(rests)})")
        middles = {(rest[:size], rest[size:]) for rest in rests for size in range(1, len(rest))}
        self._middles = {text for text, missing in middles if not text.isalnum() or self._goes_on(missing)}

    def mark(self, value: Any, marks: Marks) -> Any:
        """The same with marks in all of its texts, keys too. Roles stay: templates make control tokens of them."""
        if isinstance(value, str):
            return self._marked(value, marks)
        if isinstance(value, list):
            return [self.mark(item, marks) for item in value]
        if isinstance(value, dict):
            return {self._key(key, marks): self.mark(item, marks) for key, item in value.items()}
        return value

    def mark_messages(self, messages: Sequence[Mapping[str, object]], marks: Marks) -> list[dict[str, object]]:
        """RequestError for a role that is no plain word."""
        return [self.mark(message, marks) | {"role": checked_role(message)} for message in messages]

    def _key(self, key: str, marks: Marks) -> str:
        """Templates look for keys by name: those that are words stay, unless a template would make one a token."""
        return self._closed_start(key, marks) if WORD.match(key) else self._marked(key, marks)

    def _marked(self, text: str, marks: Marks) -> str:
        marked, done = [], 0
        for found in self._whole.finditer(text):
            marked += [self._broken(text[done : found.start()], marks), f"{marks.start}{found.group()}{marks.end}"]
            done = found.end()
        return self._closed_start("".join([*marked, self._broken(text[done:], marks)]), marks)

    def _broken(self, text: str, marks: Marks) -> str:
        """A mark after each beginning of a token that ends where the template may cut the text or goes on itself.

        And one before each rest of a token that a literal begins, since a template may cut what stands before it.
        """
        places = {found.start() for found in self._rest.finditer(text)}
        for found in self._firsts.finditer(text):
            start, end = found.span()
            while end <= len(text) and text[start:end] in self._beginnings:
                if not text[start:end].isalnum() and self._may_end(text, end):
                    places.add(end)
                end += 1
        edges = [0, *sorted(places), len(text)]
        return marks.start.join(text[start:end] for start, end in pairwise(edges))

    def _may_end(self, text: str, place: int) -> bool:
        return place >= len(text) or text[place].isspace() or text.startswith(self._literals, place)

    def _closed_start(self, text: str, marks: Marks) -> str:
        """With a mark in front of a text that is a middle of a token whose beginning a literal ends with."""
        return marks.start + text if text.strip() in self._middles else text

    def _find_rests(self) -> set[str]:
        """What makes those tokens whole that a literal ends with the beginning of."""
        longest = max(map(len, self.tokens), default=0)
        ends = {text[-size:] for text in self._literals for size in range(1, min(longest, len(text)) + 1)}
        return {token[size:] for token in self.tokens for size in range(1, len(token)) if token[:size] in ends}

    def _goes_on(self, missing: str) -> bool:
        """Whether a literal begins with what is missing of a token, or with a part of it."""
        return any(text.startswith(missing) or missing.startswith(text) for text in self._literals)


def control_tokens(
    template: nodes.Template, added: Sequence[tuple[str, bool]], named: Sequence[str] | None
) -> ControlTokens:
    """Of (text, special) of all added tokens: the special ones, and those `named` or else written by the template."""
    literals = {each.data for each in template.find_all(nodes.TemplateData)}
    literals |= {each.value for each in template.find_all(nodes.Const) if isinstance(each.value, str)}
    text = "\0".join(literals)

    def is_control(token: str) -> bool:
        return token in named if named is not None else token in text and not token.isspace()

    return ControlTokens([token for token, special in added if special or is_control(token)], literals)


def checked_role(message: Mapping[str, object]) -> str:
    """A template may make a control token of a role, so a role is a word."""
    role = message.get("role")
    if not isinstance(role, str) or not ROLE.match(role):
        raise RequestError("a role must be a word of letters, digits, - and _ (at most 64)", param="messages")
    return role


def _one_of(texts: Iterable[str]) -> str:
    """A pattern for any of them, the longest first; for nothing if there are none."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"
