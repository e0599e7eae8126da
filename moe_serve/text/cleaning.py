"""Blanks before punctuation taken off a text that grows, as off the whole text (clean_up_tokenization_spaces)."""

from __future__ import annotations

from moe_serve.text.decoding import TextStream

_REPLACED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
# Text that ends so may still become one of those.
_BEGINNINGS = tuple(sorted({found[:length] for found, _ in _REPLACED for length in range(1, len(found))}))


def clean(text: str) -> str:
    for found, instead in _REPLACED:
        text = text.replace(found, instead)
    return text


class CleanedStream:
    """Gives the text of another stream, cleaned; holds back what the next characters may change."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self._held = ""

    def push(self, token_id: int) -> str:
        joined = self._held + self._stream.push(token_id)
        # Blanks are taken off, never put in: where no beginning ends, nothing joins what comes before and after.
        end = len(joined)
        while end and joined.endswith(_BEGINNINGS, 0, end):
            end -= 1
        self._held = joined[end:]
        return clean(joined[:end])

    def finish(self) -> str:
        joined, self._held = self._held + self._stream.finish(), ""
        return clean(joined)
