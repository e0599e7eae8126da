"""A checkpoint's tokenizer: text -> ids, ids -> text, and the text and bytes of single tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers

from moe_serve.base.config import Config
from moe_serve.base.errors import CheckpointError, RequestError
from moe_serve.base.fields import read_object
from moe_serve.text.chat_template import DEFAULT_SECONDS, ChatPrompt, ChatTemplates
from moe_serve.text.decoding import LARGEST_ID, ByteDecoding, UnitDecoding, choose_decoding
from moe_serve.text.sanitizing import Sanitizer, added_tokens, named_control_tokens


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
        self._core = _load_core(self.folder / "tokenizer.json")
        config = _read_json(self.folder / "tokenizer_config.json")
        named = {name: _content(value) for name, value in config.items() if re.fullmatch(r"[a-z]+_token", name)}
        special_tokens = {name: text for name, text in named.items() if text is not None}
        self.bos_token = special_tokens.get("bos_token")
        self.eos_token = special_tokens.get("eos_token")
        self.chat_templates = _load_chat_templates(self.folder, config, special_tokens)
        self.chat_templates.configure(
            seconds=chat_template_timeout,
            added_tokens=added_tokens(self._core) if sanitize_control_tokens else None,
            control_tokens=named_control_tokens(config),
        )
        self._sanitizer = Sanitizer(self._core)
        self._special = {token.content for token in self._core.get_added_tokens_decoder().values() if token.special}
        self.vocab_size = max(self._core.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._longest = _longest_token(self._core)
        self.decoding: ByteDecoding | UnitDecoding = choose_decoding(
            self._core, self._special, self.folder / "tokenizer.json"
        )

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
        return self._core.decode(known, skip_special_tokens=skip_special_tokens)

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


def _load_core(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: a model folder needs its tokenizer in this file")
    try:
        core = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    except Exception as error:  # the library raises no narrower kind
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    # A folder may carry the cutting and filling its training used; a prompt must arrive whole.
    core.no_truncation()
    core.no_padding()
    return core


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


def _read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file; empty when there is no such file."""
    return read_object(path) if path.is_file() else {}


def _content(token: object) -> str | None:
    """A token given as text or as an object with its text."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _load_chat_templates(
    folder: Path, config: Mapping[str, object], special_tokens: Mapping[str, str]
) -> ChatTemplates:
    """chat_template.jinja wins over tokenizer_config.json's chat_template (one text, or a list of named ones)."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return ChatTemplates({"default": file.read_text(encoding="utf-8")}, special_tokens, file)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is not UTF-8 text: {error}") from error
    origin = folder / "tokenizer_config.json"
    given = config.get("chat_template")
    if given is None:
        return ChatTemplates({}, special_tokens, origin)
    if isinstance(given, str):
        return ChatTemplates({"default": given}, special_tokens, origin)
    named = (
        [(e.get("name"), e.get("template")) for e in given if isinstance(e, dict)] if isinstance(given, list) else []
    )
    sources = {name: text for name, text in named if isinstance(name, str) and isinstance(text, str)}
    if not isinstance(given, list) or len(sources) != len(given):
        raise CheckpointError(f"chat_template in {origin} must be text or a list of objects with name and template")
    return ChatTemplates(sources, special_tokens, origin)
