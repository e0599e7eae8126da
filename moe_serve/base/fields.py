"""Typed access to the JSON objects of a model folder. Which fields there are is base/model_config.py's affair.

A folder may lie: files are read up to a size, nesting ends in a sentence, and numbers have bounds before anybody counts
up to them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from moe_serve.base.errors import CheckpointError

MAX_JSON_BYTES = 16 * 2**20
"""Of a file whose objects are kept; the largest there are have a few MiB."""
LARGEST_NUMBER = 3.4e38
"""What is computed in float32 must fit it."""


def read_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, object]:
    """The object in a JSON file; CheckpointError for anything else, however large or deep."""
    try:
        if path.stat().st_size > max_bytes:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; a file of its kind has at most {max_bytes}")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{path} cannot be read as JSON: {reason}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values


def brief(value: object, limit: int = 80) -> str:
    """A value out of a file as a sentence may repeat it: short, whatever it is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deeply, or an integer of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Fields:
    """Typed access to one JSON object of a model folder; every complaint names the file and the field."""

    def __init__(
        self,
        path: Path,
        values: Mapping[str, object],
        defaults: Mapping[str, object],
        limits: Mapping[str, int] | None = None,
    ) -> None:
        self.path = path
        self.values = values
        self._defaults = defaults
        self._limits = limits or {}

    def raw(self, *names: str) -> object:
        """The value under the first of several names that is there and not null, else the default."""
        found = {name: self.values[name] for name in names if self.values.get(name) is not None}
        if len(set(map(brief, found.values()))) > 1:
            raise CheckpointError(f"{self.path}: {' and '.join(found)} differ: {brief(found)}")
        for value in found.values():
            return value
        return next((self._defaults[name] for name in names if name in self._defaults), None)

    def or_null(self, name: str) -> object:
        """The value as it is there, null too; the default only where it is left out."""
        return self.values[name] if name in self.values else self._defaults.get(name)

    def wrong(self, name: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name} must be {wanted}, not {brief(value)}")

    def integer(self, *names: str) -> int:
        value = self.raw(*names)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(self._spelling(names), value, "an integer of at least 1")
        limit = self._limits.get(names[0])
        if limit is not None and value > limit:
            raise self.wrong(self._spelling(names), value, f"at most {limit}")
        return value

    def number(self, name: str) -> float:
        value = self.raw(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < LARGEST_NUMBER:
            raise self.wrong(name, value, "a number greater than 0 and no larger than a float32 holds")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.raw(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id, a list of ids or nothing."""
        value = self.or_null(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            raise self.wrong(name, value, "a token id or a list of them")
        return tuple(ids)

    def _spelling(self, names: tuple[str, ...]) -> str:
        """The name under which the file has it."""
        return next((name for name in names if self.values.get(name) is not None), names[0])
