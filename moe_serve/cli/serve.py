"""`moe-serve serve`: every option is generated from the fields of base/config.py's sections; none is written twice.

Where a value comes from, first wins: command line, `MOE_SERVE_*` environment, `--config file.yaml`, default.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import Field, create_model
from pydantic_settings import CliPositionalArg

from moe_serve.base.config import SECTIONS, Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.registry import import_target
from moe_serve.base.section import ENVIRONMENT_PREFIX
from moe_serve.cli.environment import check_environment
from moe_serve.cli.flags import (
    Options,
    help_text,
    normalise,
    parse,
    spellings,
    variables,
    wants_help,
)
from moe_serve.launch.serve import serve

SUPERVISE = "moe_serve.launch.supervisor:supervise"
"""Imported when it is asked for: it answers HTTP itself, which no other launcher does."""
ABOUT_SERVE = (
    "Serve a model over an OpenAI-compatible HTTP API. Each option may also be given in the environment "
    "(MOE_SERVE_PORT=8000) or in a YAML file (--config); the command line wins, then the environment."
)


def run_serve(arguments: Sequence[str]) -> int:
    if wants_help(arguments):
        groups = {title: section.model_fields for title, section in SECTIONS.items()}
        print(help_text(serve_options(), "serve", ABOUT_SERVE, groups))
        return 0
    config = parse_serve(arguments)
    if config.parallel.data_parallel_multi_port_external_lb:
        supervise = cast(Callable[[Config], int], import_target(SUPERVISE, "launcher", "supervisor"))
        return supervise(config)
    return serve(config)


def serve_options() -> type[Options]:
    """One flat option class from the fields of all sections."""
    return create_model("ServeOptions", __base__=Options, **serve_fields())


def serve_fields() -> dict[str, Any]:
    """Fields of all sections, the model in its place and the file of options, as `create_model` takes them."""
    fields: dict[str, Any] = {}
    for section in SECTIONS.values():
        for name, info in section.model_fields.items():
            field = Field(info.default, description=info.description, json_schema_extra=info.json_schema_extra)
            fields[name] = (info.annotation, field)
    positional: Any = CliPositionalArg  # an alias of Annotated, which mypy cannot apply to a union
    fields["model"] = (positional[str | None], Field(None, description=_describe("model")))
    fields["config"] = (
        str | None,
        Field(None, description="YAML file with options under their flags' names."),
    )
    return fields


def parse_serve(arguments: Sequence[str]) -> Config:
    """Command line (after `serve`), environment and YAML file to a Config. Raises ConfigError; exits for --help."""
    return Config.from_flat(read_options(serve_options(), arguments, "serve"))


def read_options(known: type[Options], arguments: Sequence[str], command: str) -> dict[str, Any]:
    """What was set on the command line, in the environment or in the file of options. Raises ConfigError."""
    check_environment(os.environ, ENVIRONMENT_PREFIX, variables(known))
    file = _config_path(normalise(known, arguments, command))
    values = parse(known, arguments, command, _read_yaml(file, known))
    values.pop("config", None)
    return values


def _config_path(arguments: Sequence[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith("--config="):
            return argument.partition("=")[2]
    return None


def _read_yaml(path: str | None, known: type[Options]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold options under their names, not {type(values).__name__}")
    flags = spellings(known) | {"model": "model"}
    named = {}
    for name, value in values.items():
        flag = str(name).replace("_", "-")
        if flag == "config" or flags.get(flag, "no-").startswith("no-") or "." in flag:
            raise ConfigError(f"--config {path} holds {name}, which is no option; `moe-serve serve --help` lists them")
        inner = {str(key).replace("-", "_"): held for key, held in value.items()} if isinstance(value, dict) else value
        named[flags[flag].replace("-", "_")] = inner
    return named


def _describe(name: str) -> str:
    return next(
        section.model_fields[name].description or "" for section in SECTIONS.values() if name in section.model_fields
    )
