"""Classes of options as flags: spellings, near matches, one-line errors and help. No option is named here.

Where a value comes from, first wins: command line, `MOE_SERVE_*` environment, initial values, default.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from moe_serve.base.config import explain
from moe_serve.base.errors import ConfigError
from moe_serve.base.section import ENVIRONMENT_PREFIX, dashed

FLAG = re.compile(r"^--?([A-Za-z][A-Za-z0-9_.-]*)(=.*)?$", re.DOTALL)
POSITIONAL = get_args(CliPositionalArg[str])[-1]
SWITCH = {"true": "", "false": "no-"}


class Options(BaseSettings):
    """Base of all option classes."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # What comes from a YAML file is passed as initial values; it yields to the environment.
        return env_settings, init_settings


def parse(
    options: type[Options], arguments: Sequence[str], command: str, initial: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The options that were set, anywhere. Raises ConfigError."""
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            options, cli_parse_args=normalise(options, arguments, command), cli_prog_name=f"moe-serve {command}"
        )
        parsed = options(_cli_settings_source=source, **(initial or {}))
    except ValidationError as error:
        raise ConfigError(explain(error) + _origin(error)) from error
    except SettingsError as error:
        raise ConfigError(_reason(error) + _hint(options, command)) from error
    values: dict[str, Any] = parsed.model_dump(exclude_unset=True)
    return values


def normalise(options: type[Options], arguments: Sequence[str], command: str) -> list[str]:
    """Every flag in its one long form: `-tp`, `--tp`, `--tensor_parallel_size`, `--flag=false`.

    ConfigError for a flag that does not exist, with the one that was probably meant.
    """
    known = spellings(options)
    done: list[str] = []
    for index, argument in enumerate(arguments):
        if argument == "--":
            return done + list(arguments[index:])
        found = FLAG.match(argument)
        if found is None:
            done.append(argument)
            continue
        name, value = found.group(1).replace("_", "-"), found.group(2) or ""
        if name not in known:
            raise ConfigError(_unknown(argument.partition("=")[0], name, known) + _hint(options, command))
        if known[name] in _switches(options) and value[1:] in SWITCH and value:
            done.append(f"--{SWITCH[value[1:]]}{known[name]}")
        else:
            done.append(f"--{known[name]}{value}")
    return done


def spellings(options: type[Options]) -> dict[str, str]:
    """Every spelling of every flag, without hyphens in front, and the long form of it."""
    known = {}
    for name, info in _flags(options):
        known[name] = name
        known |= dict.fromkeys(short_forms(info), name)
        if info.annotation is bool:
            known[f"no-{name}"] = f"no-{name}"
    return known


def variables(options: type[Options]) -> set[str]:
    """Every option as the environment names it, without the prefix."""
    names = {name for name, _ in _flags(options)} | set(_positional(options))
    return {name.replace("-", "_").replace(".", "__").upper() for name in names}


def short_forms(info: FieldInfo) -> list[str]:
    """The short spellings that are kept beside a field."""
    return _extra(info, "short")


def usage(options: type[Options], command: str) -> str:
    """One line: the positional arguments and that there are options."""
    needed = {name: options.model_fields[name].is_required() for name in _positional(options)}
    places = [name.upper() if required else f"[{name.upper()}]" for name, required in needed.items()]
    return " ".join(["usage: moe-serve", command, *places, "[OPTIONS]"])


def wants_help(arguments: Sequence[str]) -> bool:
    return bool({"-h", "--help"} & set(arguments))


def help_text(
    options: type[Options], command: str, about: str, groups: Mapping[str, Collection[str]] | None = None
) -> str:
    """All options with value, default and description; in `groups` of fields, the rest under "options"."""
    titles = dict(groups or {})
    grouped = {field for fields in titles.values() for field in fields}
    titles["options"] = set(options.model_fields) - grouped
    parts = [usage(options, command), textwrap.fill(about, _width())]
    parts += [
        f"  {name.upper()}\n" + _indented(options.model_fields[name].description or "") for name in _positional(options)
    ]
    flags = dict(_flags(options))
    for title, fields in titles.items():
        names = [name for name in flags if name.partition(".")[0].replace("-", "_") in fields]
        if names:
            parts.append("\n".join([f"{title}:", *(_entry(name, flags[name]) for name in names)]))
    return "\n\n".join(parts)


def _extra(info: FieldInfo, key: str) -> list[str]:
    """A list of words that is kept beside a field."""
    extra = info.json_schema_extra
    found = extra.get(key, []) if isinstance(extra, dict) else []
    return [str(word) for word in found] if isinstance(found, list) else []


def _flags(options: type[Options]) -> Iterator[tuple[str, FieldInfo]]:
    """Long forms with their fields; those of a nested section dotted, after the section itself."""
    for name, info in options.model_fields.items():
        if name in _positional(options):
            continue
        flag = name.replace("_", "-")
        yield flag, info
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            for inner, inner_info in info.annotation.model_fields.items():
                yield f"{flag}.{inner.replace('_', '-')}", inner_info


def _positional(options: type[Options]) -> list[str]:
    return [name for name, info in options.model_fields.items() if POSITIONAL in info.metadata]


def _switches(options: type[Options]) -> set[str]:
    return {name for name, info in _flags(options) if info.annotation is bool}


def _hint(options: type[Options], command: str) -> str:
    return f"\n{usage(options, command)} (`moe-serve {command} --help` lists the options)"


def _unknown(given: str, name: str, known: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    meant = f"; did you mean --{near[0]}?" if near else ""
    return f"unknown option {given}{meant}"


def _reason(error: SettingsError) -> str:
    """What pydantic-settings and argparse say, without their own words around it."""
    text = str(error)
    field = re.match(r'error parsing value for field "(\w+)"', text)
    if field:
        return f"--{field.group(1).replace('_', '-')} must be JSON: {error.__cause__}"
    text = text.removeprefix("error parsing CLI: ").removeprefix("argument ")
    return text.replace("unrecognized arguments:", "unexpected:").replace(
        "ignored explicit argument", "takes no value:"
    )


def _origin(error: ValidationError) -> str:
    """Names the environment variables among the values that were refused: they are easily forgotten."""
    names = [ENVIRONMENT_PREFIX + str(problem["loc"][0]).upper() for problem in error.errors() if problem["loc"]]
    given = [
        name
        for name, problem in zip(names, error.errors(), strict=False)
        if os.environ.get(name) is not None and os.environ[name] == problem["input"]
    ]
    return f" (from the environment: {', '.join(given)})" if given else ""


def _entry(name: str, info: FieldInfo) -> str:
    flag = f"no-{name}" if info.default is True else name
    names = ", ".join([f"--{flag}", *map(dashed, short_forms(info))])
    told = [info.description or ""]
    if info.default is True:
        told.append("Without this flag: on.")
    elif info.default is not None and info.default is not False and not isinstance(info.default, BaseModel):
        told.append(f"[{info.default}]")
    values = _extra(info, "names") or _choices(info)
    first = f"  {names} {_value(info.annotation, values)}".rstrip()
    if len(first) > _width():
        told_values = _value(info.annotation, values).replace("|", "| ")  # so that a line may end between two
        first = f"  {names}\n{_indented(told_values).replace('| ', '|')}"
    return first + "\n" + _indented(" ".join(told))


def _choices(info: FieldInfo) -> list[str]:
    return list(map(str, get_args(info.annotation))) if get_origin(info.annotation) is Literal else []


def _value(annotation: Any, names: Sequence[str] = ()) -> str:
    """What follows a flag."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if names:
        return "|".join(names)
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) is Annotated:
        return _value(kinds[0])
    if kinds:
        return "|".join(_value(kind) for kind in kinds)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "JSON"
    return {bool: "", int: "N", float: "NUMBER"}.get(annotation, "TEXT")


def _indented(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), _width(), initial_indent=" " * 8, subsequent_indent=" " * 8)


def _width() -> int:
    return min(100, shutil.get_terminal_size().columns)
