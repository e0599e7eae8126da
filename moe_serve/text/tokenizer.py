"""A checkpoint's tokenizer: text -> ids, ids -> text, and the text and bytes of single tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers

from moe_serve.base.config import Config
from moe_serve.base.errors import RequestError
from moe_serve.text.chat_template import DEFAULT_SECONDS, ChatPrompt, ChatTemplates
from moe_serve.text.cleaning import CleanedStream, clean
from moe_serve.text.decoding import LARGEST_ID, Decoding, TextStream, choose_decoding
from moe_serve.text.folder import read_tokenizer
from moe_serve.text.sanitizing import Sanitizer, added_tokens, named_control_tokens
from moe_serve.text.stops import SpecialStops
from moe_serve.text.template_files import read_templates


class Tokenizer:
    """Loaded from a model folder in the Hugging Face layout. Raises CheckpointError naming the file.

    `eos_token`, `bos_token` as the folder names them, None where it does not. `vocab_size` is one more than the
    largest id, added tokens included. `sanitize_control_tokens` and `chat_template_timeout` as the server's options.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        sanitize_control_tokens: bool = False,
        chat_template_timeout: float = DEFAULT_SECONDS,
    ) -> None:
        self.folder = Path(folder)
        found = read_tokenizer(self.folder)
        self._core = found.core
        self.bos_token = found.special_tokens.get("bos_token")
        self.eos_token = found.special_tokens.get("eos_token")
        sources, origin = read_templates(self.folder, found.config)
        self.chat_templates = ChatTemplates(sources, found.special_tokens, origin)
        self._cleans_up = found.cleans_up
        self.chat_templates.configure(
            seconds=chat_template_timeout,
            added_tokens=added_tokens(self._core) if sanitize_control_tokens else None,
            control_tokens=named_control_tokens(found.config),
        )
        self._sanitizer = Sanitizer(self._core)
        self._special = {token.content for token in self._core.get_added_tokens_decoder().values() if token.special}
        self.vocab_size = max(self._core.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._longest = _longest_token(self._core)
        self.decoding: Decoding = choose_decoding(self._core, self._special, self.folder / "tokenizer.json")

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self._core.token_to_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self._core.token_to_id(self.eos_token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; with special tokens as the tokenizer's own post-processor adds them (a BOS or not)."""
        _check_unicode(text, "prompt")
        # Only the batch lets go of the GIL while it works, and only the fast one keeps no offsets, which are as much
        # work again to drop: megabytes of text must not stop the rest of the process.
        (encoded,) = self._core.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoded.ids
        return ids

    def encode_chat(self, prompt: ChatPrompt, add_special_tokens: bool = False) -> list[int]:
        """Ids of a rendered conversation, to which the template has written the special tokens itself."""
        _check_unicode(prompt.text, "messages")
        return self._sanitizer.encode(prompt, add_special_tokens)

    def least_tokens(self, text: str) -> int:
        """At least so many tokens a text has, known without cutting it; 0 where nothing is known."""
        return 0 if self._longest is None else -(-len(text) // self._longest)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; ids that no token has are left out."""
        known = [token_id for token_id in ids if 0 <= token_id <= LARGEST_ID]
        text = self._core.decode(known, skip_special_tokens=skip_special_tokens)
        return clean(text) if self._cleans_up else text

    def stream(self, skip_special_tokens: bool, after: Sequence[int] = ()) -> TextStream:
        """A text that is decoded token by token, and follows the tokens `after`."""
        stream = self.decoding.stream(skip_special_tokens, after)
        return CleanedStream(stream) if self._cleans_up else stream

    def special_stops(self, stops: Sequence[str], after: Sequence[int]) -> SpecialStops | None:
        """Looks for those stop strings that hold a special token's whole text; None where there are none.

        Others are looked for in what the client sees: `>` is not meant to end an answer at a hidden `<|turn|>`.
        """
        special = [stop for stop in stops if any(text in stop for text in self._special)]
        return SpecialStops(self.decoding, self.stream(False, after), special) if special else None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        options: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt text of a conversation by the chat template, as ChatTemplates.render()."""
        return self.chat_templates.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, options=options
        ).text

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, special tokens shown; empty for an id that no token has."""
        return self.decoding.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """A token by itself, as log-probabilities name it: `bytes:\\xe2\\x82` where it is part of a character."""
        found = self.decoding.token_bytes(token_id)
        if not found and self._core.id_to_token(token_id) is None:
            return f"token_id:{token_id}"
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)


def load_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of a configuration whose model is a folder."""
    server = config.server
    return Tokenizer(
        config.model.model or "",
        sanitize_control_tokens=server.sanitize_control_tokens,
        chat_template_timeout=server.chat_template_timeout,
    )


def _longest_token(core: tokenizers.Tokenizer) -> int | None:
    """Characters that one token can stand for; None if there is no limit, as for an unknown word.

    Normalizers may write several characters as one, at most four (Unicode's NFKC has longer ones, for single letters).
    """
    is_byte_level = "ByteLevel" in repr(core.pre_tokenizer)
    if not isinstance(core.model, tokenizers.models.BPE) or not (is_byte_level or core.model.byte_fallback):
        return None
    longest = max(map(len, core.get_vocab(with_added_tokens=True)), default=1)
    return max(longest, 1) * (1 if core.normalizer is None else 4)


def _check_unicode(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text is not valid Unicode: {error}", param=param) from error
