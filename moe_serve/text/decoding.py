"""How the tokens of one tokenizer become text one after another, exactly as decoding them all at once would.

A text may go on where others end: an answer adds to its prompt what decoding both together adds to the prompt's own
text, which is never taken back.

Two kinds cover the tokenizers in use. ByteLevel: a token is some bytes, the text is their UTF-8. All others: a
token is some text that does not depend on its neighbours, except at the very start of the text and in runs of byte
tokens (`<0xE2>`), which count together. A decoder that fits neither is refused when the tokenizer is loaded.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from moe_serve.base.errors import CheckpointError

LARGEST_ID = 2**32 - 1
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BEGUN_BYTES = 3  # of a character of UTF-8 that is not complete, at most
_LOOK_BACK = 64  # tokens without text between the bytes of one character are not looked through for ever


class TextStream(Protocol):
    """One text in the making."""

    def push(self, token_id: int) -> str:
        """The text that is certain once this token is known."""
        ...

    def finish(self) -> str:
        """The rest: what waited for more tokens."""
        ...


class Decoding(Protocol):
    """How one tokenizer's tokens become text."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, special tokens shown; empty for an id that no token has."""
        ...

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves the token out."""
        ...

    def stream(self, skip_special_tokens: bool, after: Sequence[int] = ()) -> TextStream:
        """A text that follows the tokens `after`, of which it gives nothing itself."""
        ...


class ByteDecoding:
    """Byte-level tokenizers."""

    def __init__(self, core: tokenizers.Tokenizer, special: Iterable[str]) -> None:
        self._core = core
        self._special = frozenset(special)
        self._byte_of = _byte_of_character()

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes(_token(self._core, token_id))

    def visible_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes:
        token = _token(self._core, token_id)
        return b"" if skip_special_tokens and token in self._special else self._bytes(token)

    def is_special(self, token_id: int) -> bool:
        return _token(self._core, token_id) in self._special

    def stream(self, skip_special_tokens: bool, after: Sequence[int] = ()) -> TextStream:
        return _ByteStream(self, skip_special_tokens, after)

    def _bytes(self, token: str | None) -> bytes:
        if token is None:
            return b""
        try:
            return bytes([self._byte_of[character] for character in token])
        except KeyError:
            # An added token that is written as plain text.
            return token.encode()


class UnitDecoding:
    """Tokenizers whose tokens are pieces of text, with or without byte tokens.

    `strip` characters at most are taken off the start of the whole text.
    """

    def __init__(
        self, core: tokenizers.Tokenizer, special: Iterable[str], *, strip: int, byte_tokens: bool, path: Path
    ) -> None:
        self.strip = strip
        self._core = core
        self._special = frozenset(special)
        self._byte_tokens = byte_tokens
        self._pieces: dict[int, str] = {}
        self._anchor = self._find_anchor(path)
        self._anchor_text = self.decode(self._anchor)

    def decode(self, ids: list[int]) -> str:
        return self._core.decode(ids, skip_special_tokens=False)

    def later(self, unit: list[int]) -> str:
        """Text of a token, or of a run of byte tokens, anywhere but at the start."""
        if len(unit) == 1 and unit[0] in self._pieces:
            return self._pieces[unit[0]]
        text = self.decode([*self._anchor, *unit])[len(self._anchor_text) :]
        if len(unit) == 1:
            self._pieces[unit[0]] = text
        return text

    def is_byte(self, token_id: int) -> bool:
        token = _token(self._core, token_id)
        return self._byte_tokens and token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def is_visible(self, token_id: int, skip_special_tokens: bool) -> bool:
        token = _token(self._core, token_id)
        return token is not None and not (skip_special_tokens and token in self._special)

    def token_bytes(self, token_id: int) -> bytes:
        token = _token(self._core, token_id)
        if token is None:
            return b""
        found = _BYTE_TOKEN.fullmatch(token) if self._byte_tokens else None
        return bytes([int(found[1], 16)]) if found else self.later([token_id]).encode()

    def is_special(self, token_id: int) -> bool:
        return _token(self._core, token_id) in self._special

    def stream(self, skip_special_tokens: bool, after: Sequence[int] = ()) -> TextStream:
        return _UnitStream(self, skip_special_tokens, after)

    def _find_anchor(self, path: Path) -> list[int]:
        """Tokens that decode to more text than is stripped: what is put before a token to see it as a later one."""
        vocabulary = sorted(self._core.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
        plain = [token_id for token, token_id in vocabulary if token.isascii() and token.isalnum()]
        others = [token_id for token, token_id in vocabulary if not _BYTE_TOKEN.fullmatch(token)]
        for token_id in [*plain[:1], *others]:
            anchor = [token_id] * (self.strip + 1)
            if self.decode(anchor):
                return anchor
        raise CheckpointError(f"{path} has no token that decodes to text")


class _ByteStream:
    """A character that was begun before this text, and not ended there, is part of this text."""

    def __init__(self, decoding: ByteDecoding, skip_special_tokens: bool, after: Sequence[int]) -> None:
        self._decoding = decoding
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        begun = b""
        for token_id in islice(reversed(after), _LOOK_BACK):
            begun = decoding.visible_bytes(token_id, skip_special_tokens) + begun
            if len(begun) >= _BEGUN_BYTES:
                break
        self._utf8.decode(begun[-_BEGUN_BYTES:])
        self._begun = bool(self._utf8.getstate()[0])

    def push(self, token_id: int) -> str:
        return self._own(self._utf8.decode(self._decoding.visible_bytes(token_id, self._skip)))

    def finish(self) -> str:
        return self._own(self._utf8.decode(b"", final=True))

    def _own(self, text: str) -> str:
        """A replacement of what was begun before this text, and did not become a character, is not of this text."""
        begun, self._begun = self._begun, self._begun and not text
        return text[1:] if begun and text.startswith("\ufffd") else text


class _UnitStream:
    """Byte tokens in a row are held until the run ends: one bad byte spoils the text of all of them."""

    def __init__(self, decoding: UnitDecoding, skip_special_tokens: bool, after: Sequence[int]) -> None:
        self._decoding = decoding
        self._skip = skip_special_tokens
        self._run: list[int] = []
        # The start of the text, decoded whole until it is longer than what may be stripped from it.
        self._head: list[int] | None = []
        self._head_length = 0
        self._head_text = ""
        self._num_given = 0
        for token_id in after:
            self.push(token_id)
            if self._head is None:
                break
        self._run = self._last_run(after)
        self._num_given = len(self._run)  # so many of the run were there before this text

    def push(self, token_id: int) -> str:
        if not self._decoding.is_visible(token_id, self._skip):
            return ""
        if self._decoding.is_byte(token_id):
            self._run.append(token_id)
            return ""
        return self._end_run() + self._add([token_id])

    def finish(self) -> str:
        return self._end_run()

    def _last_run(self, token_ids: Sequence[int]) -> list[int]:
        run: list[int] = []
        for token_id in reversed(token_ids):
            if self._decoding.is_visible(token_id, self._skip):
                if not self._decoding.is_byte(token_id):
                    break
                run.append(token_id)
        return run[::-1]

    def _end_run(self) -> str:
        run, self._run = self._run, []
        num_given, self._num_given = self._num_given, 0
        if not num_given:
            return self._add(run) if run else ""
        before = self._would_add(run[:num_given])
        text = self._add(run)
        if text.startswith(before):
            return text[len(before) :]
        if set(text) == {"\ufffd"}:
            return text[num_given:]
        # The run's last character was only begun before this text.
        given = b"".join(map(self._decoding.token_bytes, run[:num_given]))
        return text[len(given.decode(errors="ignore")) :]

    def _would_add(self, unit: list[int]) -> str:
        if self._head is None:
            return self._decoding.later(unit)
        return self._decoding.decode([*self._head, *unit])[len(self._head_text) :]

    def _add(self, unit: list[int]) -> str:
        text = self._decoding.later(unit)
        if self._head is None:
            return text
        if not text and self._head:
            return ""
        self._head += unit
        self._head_length += len(text)
        before, self._head_text = self._head_text, self._decoding.decode(self._head)
        if self._head_length > self._decoding.strip:
            self._head = None
        return self._head_text[len(before) :]


def choose_decoding(core: tokenizers.Tokenizer, special: Iterable[str], path: Path) -> ByteDecoding | UnitDecoding:
    """The kind of decoding of a tokenizer; CheckpointError for a decoder that cannot be followed token by token."""
    steps = _decoder_steps(json.loads(core.to_str())["decoder"])
    kinds = [step["type"] for step in steps]
    if kinds and kinds[0] == "ByteLevel" and set(kinds) <= {"ByteLevel", "Fuse"}:
        return ByteDecoding(core, special)
    fused = False
    strip = 0
    for step in steps:
        kind = step["type"]
        local = kind in ("Replace", "ByteFallback", "Metaspace", "WordPiece", "Strip") and not fused
        at_start = kind == "Strip" and fused and step["stop"] == 0
        if not (local or at_start or kind == "Fuse"):
            raise CheckpointError(
                f"{path}: a decoder made of {', '.join(kinds)} is not supported; supported are ByteLevel, and Replace, "
                "ByteFallback, Metaspace, WordPiece, Strip, then Fuse, then Strip at the start"
            )
        fused = fused or kind == "Fuse"
        strip += step["start"] if at_start else 0
    return UnitDecoding(core, special, strip=strip, byte_tokens="ByteFallback" in kinds, path=path)


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The decoder's parts in order, sequences inside sequences laid flat."""
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _decoder_steps(part)]


def _token(core: tokenizers.Tokenizer, token_id: int) -> str | None:
    return core.id_to_token(token_id) if 0 <= token_id <= LARGEST_ID else None


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
