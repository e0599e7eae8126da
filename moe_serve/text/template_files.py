"""Which chat templates a model folder has, and under which names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from moe_serve.base.errors import CheckpointError

FILE = "chat_template.jinja"
FURTHER = "additional_chat_templates"
PROCESSORS = "chat_template.json"
log = logging.getLogger(__name__)


def read_templates(folder: Path, config: Mapping[str, object]) -> tuple[dict[str, str], Path]:
    """Sources by name, and where they are from.

    chat_template.jinja ("default") and additional_chat_templates/NAME.jinja, if there are any; else chat_template of
    tokenizer_config.json (`config`): one text, or named ones in a list or an object.
    """
    files = {"default": folder / FILE} if (folder / FILE).is_file() else {}
    files |= {path.name.removesuffix(".jinja"): path for path in sorted((folder / FURTHER).glob("*.jinja"))}
    if files:
        origin = folder if len(files) > 1 else next(iter(files.values()))
        return {name: _read(path) for name, path in files.items()}, origin
    origin = folder / "tokenizer_config.json"
    given = config.get("chat_template")
    if given is None:
        if (folder / PROCESSORS).is_file():
            log.warning("%s is not read: it is a processor's; put its template into %s", folder / PROCESSORS, FILE)
        return {}, origin
    return _named(given, origin), origin


def _named(given: object, origin: Path) -> dict[str, str]:
    if isinstance(given, str):
        return {"default": given}
    pairs: list[tuple[object, object]] = []
    if isinstance(given, dict):
        pairs = list(given.items())
    elif isinstance(given, list):
        pairs = [(each.get("name"), each.get("template")) if isinstance(each, dict) else (None, None) for each in given]
    sources = {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    if not isinstance(given, dict | list) or len(sources) != len(given):
        raise CheckpointError(
            f"chat_template in {origin} must be text, a list of objects with name and template, or an object from "
            "names to templates"
        )
    return sources


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}") from error
