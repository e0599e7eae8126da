"""Typed access to the JSON objects of a model folder. Which fields there are is base/model_config.py's affair."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from moe_serve.base.errors import CheckpointError


class Fields:
    """Typed access to one JSON object of a model folder; every complaint names the file and the field."""

    def __init__(self, path: Path, values: Mapping[str, object], defaults: Mapping[str, object]) -> None:
        self.path = path
        self.values = values
        self._defaults = defaults

    def raw(self, *names: str) -> object:
        """The value under the first of several names that is there and not null, else the default."""
        found = {name: self.values[name] for name in names if self.values.get(name) is not None}
        if len(set(map(repr, found.values()))) > 1:
            raise CheckpointError(f"{self.path}: {' and '.join(found)} differ: {found}")
        for value in found.values():
            return value
        return next((self._defaults[name] for name in names if name in self._defaults), None)

    def or_null(self, name: str) -> object:
        """The value as it is there, null too; the default only where it is left out."""
        return self.values[name] if name in self.values else self._defaults.get(name)

    def wrong(self, name: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name} must be {wanted}, not {value!r}")

    def integer(self, *names: str) -> int:
        value = self.raw(*names)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(names[0], value, "an integer of at least 1")
        return value

    def number(self, name: str) -> float:
        value = self.raw(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.wrong(name, value, "a number greater than 0")
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
