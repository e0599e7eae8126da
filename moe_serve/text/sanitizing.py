"""Ids of a conversation whose control tokens are those that the template wrote; those of a client are ordinary text.

The template's are found where the tokenizer itself finds them once the client's are masked. Each text between two of
them is encoded by a copy of the tokenizer that takes no control token for one, marks removed: so a client's text has
the ids it had if the tokenizer did not know those tokens.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from moe_serve.base.errors import RequestError
from moe_serve.text.chat_template import ChatPrompt
from moe_serve.text.control_tokens import Piece


class Sanitizer:
    """Of one tokenizer. `encode` for any thread."""

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        self._core = core
        added = core.get_added_tokens_decoder()
        self._ids = {token.content: token_id for token_id, token in added.items()}
        self._normalized = {token.content for token in added.values() if token.normalized}
        self._plain = functools.lru_cache(maxsize=8)(self._make_plain)

    def encode(self, prompt: ChatPrompt, add_special_tokens: bool = False) -> list[int]:
        """RequestError where the tokenizer has no other way to write a control token than the token."""
        if prompt.marks is None or not self._needs_care(prompt):
            return _ids_of(self._core, prompt.text, add_special_tokens)
        pieces = list(prompt.marks.pieces(prompt.marked, prompt.control_tokens))
        ids: list[int] = []
        for start, text, token_id in self._parts(pieces, prompt):
            ids += [token_id] if token_id is not None else self._encode_text(text, prompt, first=start == 0)
        return self._framed(ids) if add_special_tokens else ids

    def _framed(self, ids: list[int]) -> list[int]:
        """With what the tokenizer's post-processor puts around any text."""
        bare, framed = _ids_of(self._core, "a"), _ids_of(self._core, "a", add_special_tokens=True)
        start = next((at for at in range(len(framed)) if framed[at : at + len(bare)] == bare), 0)
        return framed[:start] + ids + framed[start + len(bare) :]

    def _needs_care(self, prompt: ChatPrompt) -> bool:
        """Nothing is marked in most conversations. A token that is matched after normalizing may be written in more
        ways than the marks know."""
        return len(prompt.marked) != len(prompt.text) or (
            self._core.normalizer is not None and not self._normalized.isdisjoint(prompt.control_tokens)
        )

    def _parts(self, pieces: Sequence[Piece], prompt: ChatPrompt) -> Iterator[tuple[int, str, int | None]]:
        """(place, text, id) of the template's control tokens and, without an id, of the texts between them.

        The mask has a character for each of the pieces' texts, and one more between two pieces.
        """
        assert prompt.marks is not None
        mask = prompt.marks.start
        masked = mask.join(mask * len(piece.text) if piece.written else piece.text for piece in pieces)
        clear = mask.join(piece.text for piece in pieces)
        done = 0
        for start, end, token_id in self._found(masked, prompt.control_tokens):
            yield done, self._unmasked(clear[done:start], mask), None
            yield start, clear[start:end], token_id
            done = end
        yield done, self._unmasked(clear[done:], mask), None

    def _unmasked(self, text: str, mask: str) -> str:
        return text.replace(mask, "")

    def _found(self, masked: str, control_tokens: Sequence[str]) -> list[tuple[int, int, int]]:
        """Where control tokens stand, with the blanks that they take in."""
        ids = {self._ids[token]: token for token in control_tokens if token in self._ids}
        (encoded,) = self._core.encode_batch([masked], add_special_tokens=False)
        spans = zip(encoded.ids, encoded.offsets, strict=True)
        return [
            (start, end, token_id)
            for token_id, (start, end) in spans
            if token_id in ids and masked[start:end].strip() == ids[token_id].strip()
        ]

    def _encode_text(self, text: str, prompt: ChatPrompt, *, first: bool) -> list[int]:
        ids = _ids_of(self._plain(prompt.control_tokens, first), text)
        found = set(ids)
        for token in prompt.control_tokens:
            if self._ids.get(token) in found and token in text:
                raise RequestError(
                    f"the messages hold {token}, which this tokenizer cannot read as ordinary text (server option "
                    "--sanitize-control-tokens)",
                    param="messages",
                )
        return ids

    def _make_plain(self, control_tokens: tuple[str, ...], first: bool) -> tokenizers.Tokenizer:
        """A copy without control tokens. Not `first`: for a text that others stand before."""
        values = json.loads(self._core.to_str())
        for token in values["added_tokens"]:
            token["special"] = token["content"] in control_tokens
        if not first:
            _go_on(values["pre_tokenizer"])
        core = tokenizers.Tokenizer.from_str(json.dumps(values))
        core.encode_special_tokens = True
        return core


def _go_on(pre_tokenizer: dict[str, Any] | None) -> None:
    """Metaspace may put a blank before the first text only."""
    if pre_tokenizer is None:
        return
    for each in pre_tokenizer.get("pretokenizers", ()):
        _go_on(each)
    if pre_tokenizer["type"] == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "first":
        pre_tokenizer["prepend_scheme"] = "never"


def _ids_of(core: tokenizers.Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    (encoded,) = core.encode_batch_fast([text], add_special_tokens=add_special_tokens)  # lets go of the GIL
    ids: list[int] = encoded.ids
    return ids


def added_tokens(core: tokenizers.Tokenizer) -> list[tuple[str, bool]]:
    """(text, special) of a tokenizer's added tokens."""
    return [(token.content, token.special) for token in core.get_added_tokens_decoder().values()]


def named_control_tokens(config: Mapping[str, object]) -> list[str] | None:
    """What tokenizer_config.json says to be control tokens besides the special ones; None where it does not."""
    named = config.get("chat_control_tokens")
    return [token for token in named if isinstance(token, str)] if isinstance(named, list) else None
