"""What a model folder says of its tokenizer: which tokens it adds, which are special, under which names.

Read as transformers' loader of fast tokenizers reads it, file by file; docs/models.md says what wins. Which of its
classes would build a tokenizer anew, and how, is text/tokenizer_classes.py's affair.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from moe_serve.base.errors import CheckpointError
from moe_serve.base.fields import read_object
from moe_serve.text.tokenizer_classes import default_tokens, warn_of_pipeline

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
FOLLOWED_VERSION = (5, 24)
"""The version of transformers that is followed; folders can hold tokenizers for some versions only."""

STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = str | AddedToken
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenizerFolder:
    """`core` as it is to be used, `config` the object in tokenizer_config.json ({} without it).

    `special_tokens` texts by the names that templates know them under.
    """

    core: tokenizers.Tokenizer
    config: Mapping[str, object]
    special_tokens: Mapping[str, str]

    @property
    def cleans_up(self) -> bool:
        """Whether decoding takes blanks off before punctuation; for BPE it would take off what belongs to the text."""
        forced = self.config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output") is True
        is_bpe = isinstance(self.core.model, tokenizers.models.BPE)
        return self.config.get("clean_up_tokenization_spaces") is True and (forced or not is_bpe)


@dataclass(slots=True)
class _Declared:
    """What the files beside tokenizer.json declare. `added` by the id they give, `named` in transformers' order,
    `lost` for an id that tokenizer.json gives to another.
    """

    added: dict[int, AddedToken] = field(default_factory=dict)
    named: dict[str, Token] = field(default_factory=dict)
    extra: list[Token] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    origin: Path = Path()


def read_tokenizer(folder: Path) -> TokenizerFolder:
    """Raises CheckpointError that names the file, and what in it cannot be."""
    config = read_if_there(folder / CONFIG)
    path = folder / _tokenizer_file(folder, config)
    core, padding = _load_core(path)
    model = read_if_there(folder / "config.json")
    for name, text in default_tokens(config, model).items():
        if core.token_to_id(text) is not None:
            config.setdefault(name, text)
    if padding is not None:
        config.setdefault("pad_token", padding)
    warn_of_pipeline(core, config, model, path)
    declared = _declared(folder, config, core)
    _add(core, declared)
    core.encode_special_tokens = config.get("split_special_tokens") is True
    return TokenizerFolder(core, config, {name: str_of(token) for name, token in declared.named.items()})


def read_if_there(path: Path) -> dict[str, object]:
    """The object in a JSON file; empty when there is no such file."""
    return read_object(path) if path.is_file() else {}


def str_of(token: Token) -> str:
    return token if isinstance(token, str) else str(token.content)


def _tokenizer_file(folder: Path, config: Mapping[str, object]) -> str:
    """tokenizer.json, unless fast_tokenizer_files has one for a version of transformers that is old enough."""
    names = config.get("fast_tokenizer_files")
    if names is None:
        return TOKENIZER
    if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{folder / CONFIG}: fast_tokenizer_files must be a list of names of files")
    found = {name: re.fullmatch(r"tokenizer\.(\d+(?:\.\d+)*)\.json", name) for name in names}
    versions = {name: tuple(map(int, match[1].split("."))) for name, match in found.items() if match}
    usable = [name for name, version in versions.items() if version <= FOLLOWED_VERSION]
    return max(usable, key=versions.__getitem__, default=TOKENIZER)


def _load_core(path: Path) -> tuple[tokenizers.Tokenizer, str | None]:
    """The tokenizer, and the token that its training filled texts with."""
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: a model folder needs its tokenizer in this file (tokenizer.model, tekken.json and "
            "vocab.json with merges.txt are not read; load the tokenizer with transformers and save it)"
        )
    try:
        core = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    except Exception as error:  # the library raises no narrower kind
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    padding = core.padding
    # A folder may carry the cutting and filling its training used; a prompt must arrive whole.
    core.no_truncation()
    core.no_padding()
    return core, None if padding is None else str(padding["pad_token"])


def _declared(folder: Path, config: Mapping[str, object], core: tokenizers.Tokenizer) -> _Declared:
    """added_tokens_decoder makes special_tokens_map.json and added_tokens.json unread, as in transformers."""
    path = folder / CONFIG
    values = dict(config)
    if not values.get("extra_special_tokens") and "additional_special_tokens" in values:
        values["extra_special_tokens"] = values.pop("additional_special_tokens")
    if isinstance(extra := values.get("extra_special_tokens"), dict):
        del values["extra_special_tokens"]
        own = values.get("model_specific_special_tokens")
        values["model_specific_special_tokens"] = {**(own if isinstance(own, dict) else {}), **extra}
    if "added_tokens_decoder" in config:
        declared = _Declared(_added_by_id(config["added_tokens_decoder"], path), origin=path)
    else:
        _merge_special_tokens_map(values, folder / SPECIAL_TOKENS_MAP)
        declared = _Declared(origin=folder / ADDED_TOKENS)
    declared.named, declared.extra = _named(values, path)
    if "added_tokens_decoder" not in config:
        special = {str_of(token) for token in [*declared.named.values(), *declared.extra]}
        listed = _added_by_text(read_if_there(folder / ADDED_TOKENS), special, folder / ADDED_TOKENS)
        there = core.get_added_tokens_decoder()
        declared.lost = [token.content for place, token in listed.items() if place in there and token != there[place]]
        declared.added = listed | there
    known = {token.content: token for token in declared.added.values()}
    for name in STANDARD:
        if name in declared.named:
            declared.named[name] = known.get(str_of(declared.named[name]), declared.named[name])
    return declared


def _added_by_id(given: object, path: Path) -> dict[int, AddedToken]:
    if not isinstance(given, dict) or not all(key.isdecimal() for key in given):
        raise CheckpointError(f"{path}: added_tokens_decoder must be an object from token ids to tokens")
    return {int(key): _object_token(value, path, "added_tokens_decoder") for key, value in given.items()}


def _added_by_text(given: Mapping[str, object], special: set[str], path: Path) -> dict[int, AddedToken]:
    added = {}
    for text, token_id in given.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise CheckpointError(f"{path}: the id of token {text!r} must be an integer, not {token_id!r}")
        is_special = text in special
        added[token_id] = AddedToken(text, normalized=not is_special, special=is_special)
    return added


def _merge_special_tokens_map(values: dict[str, object], path: Path) -> None:
    """What it says goes over tokenizer_config.json, but for tokens without a name, which join those there."""
    for name, value in read_if_there(path).items():
        if name in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, list):
            given = values.get("extra_special_tokens")
            if name == "additional_special_tokens" and "extra_special_tokens" in values:
                continue
            listed = given if isinstance(given, list) else []
            values["extra_special_tokens"] = listed + [each for each in value if each not in listed]
        elif isinstance(value, dict) and name != "extra_special_tokens":
            values[name] = value | {"special": True}
        else:
            values[name] = value


def _named(values: Mapping[str, object], path: Path) -> tuple[dict[str, Token], list[Token]]:
    """Special tokens with a name, the usual ones first, and those without."""
    extra = values.get("extra_special_tokens")
    own = values.get("model_specific_special_tokens")
    found = {name: values[name] for name in STANDARD if values.get(name) is not None}
    others = {name: value for name, value in values.items() if name.endswith("_token") and name not in STANDARD}
    found |= {name: value for name, value in others.items() if isinstance(value, dict)}
    found |= {name: value for name, value in others.items() if isinstance(value, str)}
    for further in (own, extra):  # special_tokens_map.json can bring an object of them as well
        found |= further if isinstance(further, dict) else {}
    named = {name: _token(value, path, name) for name, value in found.items()}
    if extra is not None and not isinstance(extra, dict | list):
        raise CheckpointError(f"{path}: extra_special_tokens must be a list of tokens, or an object of named ones")
    listed = extra if isinstance(extra, list) else []
    return named, [_token(value, path, "extra_special_tokens") for value in listed]


def _token(value: object, path: Path, name: str) -> Token:
    return value if isinstance(value, str) else _object_token(value, path, name)


def _object_token(value: object, path: Path, name: str) -> AddedToken:
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise CheckpointError(f"{path}: {name} must be a token's text or an object with its content, not {value!r}")
    flags: dict[str, Any] = {flag: value[flag] for flag in _TOKEN_FLAGS if isinstance(value.get(flag), bool)}
    return AddedToken(value["content"], **flags)


def _add(core: tokenizers.Tokenizer, declared: _Declared) -> None:
    """Make the declared tokens tokens. Those that the vocabulary lacks get the next ids, whatever was declared."""
    by_id = sorted(declared.added.items())
    wanted: list[Token] = [token for _, token in by_id]
    known = {token.content for token in core.get_added_tokens_decoder().values()} | {str_of(each) for each in wanted}
    for token in [*declared.named.values(), *declared.extra]:
        if str_of(token) not in known:
            known.add(str_of(token))
            wanted.append(token)
    names = {str_of(token) for token in declared.named.values()}
    added = []
    for token in wanted:
        if isinstance(token, str):
            token = AddedToken(token, special=True)
        elif token.content in names:
            token.special = True
        added.append(token)
    core.add_tokens(added)
    moved = [
        f"{token.content} ({token_id})" for token_id, token in by_id if core.token_to_id(token.content) != token_id
    ]
    if moved:
        log.warning(
            "%s gives tokens other ids than %s does, which are used: %s", declared.origin, TOKENIZER, ", ".join(moved)
        )
