"""Tables of pluggable implementations: a name maps to "module:attribute", imported when it is first used.

The only place in the package that imports late; it turns an absent extra into a sentence.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from moe_serve.base.errors import ConfigError, MissingExtra


class Registry:
    """`names()` lists what there is; `second_names`: other spellings of these.

    `sources`: of packages that are not brought along, what to do to have them.
    """

    def __init__(
        self,
        kind: str,
        option: str,
        table: Mapping[str, str],
        second_names: Mapping[str, str] = MappingProxyType({}),
        sources: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.kind = kind
        self.option = option
        self._second_names = second_names
        self._table = dict(table)
        self._sources = sources

    def names(self) -> tuple[str, ...]:
        return tuple(self._table)

    def first_name(self, name: str) -> str:
        """What a second name stands for; any other name as it is."""
        return self._second_names.get(name, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def target(self, name: str) -> str:
        """The "module:attribute" behind a name, without importing it."""
        self.check(name)
        return self._table[name]

    def check(self, name: str) -> None:
        """Raise ConfigError unless there is this `name`."""
        if name in self._table:
            return
        allowed = ", ".join(self._table)
        raise ConfigError(f"unknown {self.kind} {name!r}; known are: {allowed} (option {self.option})")

    def name_of(self, built: object) -> str | None:
        """The name behind which the class of `built` stands; None if it stands behind none."""
        target = f"{type(built).__module__}:{type(built).__qualname__}"
        return next((name for name, each in self._table.items() if each == target), None)

    def load(self, name: str) -> object:
        """Import and return what stands behind `name`; raises ConfigError or MissingExtra."""
        self.check(name)
        return import_target(self._table[name], self.kind, name, self._sources)


def import_target(target: str, kind: str, name: str, sources: Mapping[str, str] = MappingProxyType({})) -> object:
    """Import "module:attribute"; an absent third-party module becomes MissingExtra, with its `sources`."""
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("moe_serve"):
            raise
        source = sources.get(error.name or "")
        raise MissingExtra(
            f"{kind} {name!r} needs the Python package {error.name!r}, which is not installed"
            + (f"; {source}" if source else "")
        ) from error
    found: object = getattr(module, attribute)
    return found
