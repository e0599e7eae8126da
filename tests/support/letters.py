"""A tokenizer in which every token is one letter of its own, so that an answer's text tells its token ids."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

FIRST_LETTER = 0x4E00


def write_letters(folder: Path, vocab_size: int) -> None:
    """tokenizer.json and tokenizer_config.json with a chat template."""
    vocabulary = {chr(FIRST_LETTER + token_id): token_id for token_id in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=chr(FIRST_LETTER)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


def text_of(token_ids: list[int]) -> str:
    return "".join(chr(FIRST_LETTER + token_id) for token_id in token_ids)


def ids_of(text: str) -> list[int]:
    return [ord(letter) - FIRST_LETTER for letter in text]
