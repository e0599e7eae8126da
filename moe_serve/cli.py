"""The `moe-serve` command. Every option is generated from the fields in base/config.py; no flag is written here twice.

Where a value comes from, first wins: command line, `MOE_SERVE_*` environment, `--config file.yaml`, default.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from moe_serve.base.config import SECTIONS, Config, explain
from moe_serve.base.errors import ConfigError, MoEServeError
from moe_serve.base.registry import import_target
from moe_serve.chat import ChatServer, converse, make_console
from moe_serve.launch import serve
from moe_serve.spawn import serve_command, spawned_server

USAGE = """usage: moe-serve COMMAND [OPTIONS]

commands:
  serve [MODEL]      serve a model over an OpenAI-compatible HTTP API
  chat               talk to a running server, or with --spawn to one of its own
  make-model DIR     write a small random-weight checkpoint
  version            print the version

`moe-serve COMMAND --help` lists a command's options."""
FLAG = re.compile(r"^--?([A-Za-z][A-Za-z0-9_.-]*)(=.*)?$", re.DOTALL)


class Options(BaseSettings):
    """Base of the generated option classes."""

    model_config = SettingsConfigDict(
        env_prefix="MOE_SERVE_",
        env_nested_delimiter="__",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
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
        # What comes from the YAML file is passed as initial values; it yields to the environment.
        return env_settings, init_settings


def serve_options() -> type[Options]:
    """One flat option class from the fields of all sections."""
    fields: dict[str, Any] = {}
    for section in SECTIONS.values():
        for name, info in section.model_fields.items():
            spellings = _short(info.json_schema_extra)
            described = info.description or ""
            if spellings:
                described += f" Short: {', '.join('--' + spelling for spelling in spellings)}."
            fields[name] = (info.annotation, Field(info.default, description=described))
    positional: Any = CliPositionalArg  # an alias of Annotated, which mypy cannot apply to a union
    fields["model"] = (positional[str | None], Field(None, description=_describe("model")))
    fields["config"] = (
        str | None,
        Field(None, description="YAML file with options under their flags' names."),
    )
    return create_model("ServeOptions", __base__=Options, **fields)


class MakeModelOptions(Options):
    folder: CliPositionalArg[Path] = Field(description="Folder to write; must be empty or absent.")
    preset: Literal["tiny", "small"] = Field("tiny", description="Size of the model.")
    arch: Literal["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"] = Field("qwen3_moe", description="Architecture.")
    seed: int = Field(0, description="Seed of the random weights.")


class ChatOptions(Options):
    url: str = Field("http://127.0.0.1:8000", description="Address of the server.")
    api_key: str | None = Field(None, description="Key that the server asks for.")
    system: str | None = Field(None, description="System message in front of the conversation.")
    temperature: float | None = Field(None, description="Sampling temperature; the model's own if not given.")
    max_tokens: int | None = Field(None, description="Longest answer; 512 or half the context if not given.")
    spawn: bool = Field(
        False, description="Start a server of its own and end it afterwards; all options that follow are `serve`'s."
    )


def parse_serve(arguments: Sequence[str]) -> Config:
    """Command line (after `serve`), environment and YAML file to a Config. Raises ConfigError; exits for --help."""
    known = serve_options()
    arguments = normalise(arguments, _shorts())
    values = _parse(known, arguments, "serve", _read_yaml(_config_path(arguments), set(known.model_fields)))
    values.pop("config", None)
    return Config.from_flat(values)


def normalise(arguments: Sequence[str], shorts: dict[str, str]) -> list[str]:
    """Short flags (`-tp`, `--tp`) to long ones, and underscores in a flag's name to hyphens."""
    done = []
    for argument in arguments:
        found = FLAG.match(argument)
        if found is None:
            done.append(argument)
            continue
        name, value = found.group(1), found.group(2) or ""
        if argument.startswith("--") or name in shorts:
            done.append("--" + shorts.get(name, name).replace("_", "-") + value)
        else:
            done.append(argument)
    return done


def _parse(
    options: type[Options], arguments: list[str], command: str, initial: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The options that were set, anywhere; `initial` come last."""
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            options, cli_parse_args=arguments, cli_prog_name=f"moe-serve {command}"
        )
        parsed = options(_cli_settings_source=source, **(initial or {}))
    except ValidationError as error:
        raise ConfigError(explain(error)) from error
    except SettingsError as error:
        raise ConfigError(str(error.__cause__ or error)) from error
    values: dict[str, Any] = parsed.model_dump(exclude_unset=True)
    return values


def _config_path(arguments: Sequence[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == "--config" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith("--config="):
            return argument.partition("=")[2]
    return None


def _read_yaml(path: str | None, known: set[str]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must hold options under their names, not {type(values).__name__}")
    named = {str(name).replace("-", "_"): value for name, value in values.items()}
    unknown = sorted(set(named) - known)
    if unknown:
        raise ConfigError(f"--config {path} holds unknown options: {', '.join(unknown)}")
    return named


def _short(extra: object) -> list[str]:
    found = extra.get("short", []) if isinstance(extra, dict) else []
    return [str(spelling) for spelling in found]


def _shorts() -> dict[str, str]:
    return {
        spelling: name.replace("_", "-")
        for section in SECTIONS.values()
        for name, info in section.model_fields.items()
        for spelling in _short(info.json_schema_extra)
    }


def _describe(name: str) -> str:
    return next(
        section.model_fields[name].description or "" for section in SECTIONS.values() if name in section.model_fields
    )


def run_serve(arguments: Sequence[str]) -> int:
    return serve(parse_serve(arguments))


def run_make_model(arguments: Sequence[str]) -> int:
    options = _parse(MakeModelOptions, list(arguments), "make-model")
    # Reached by name: it needs torch, which the other commands must not wait for.
    make_model: Any = import_target("moe_serve.make_model:make_model", "command", "make-model")
    make_model(**options)
    print(options["folder"])
    return 0


def run_chat(arguments: Sequence[str]) -> int:
    arguments = list(arguments)
    cut = arguments.index("--spawn") + 1 if "--spawn" in arguments else len(arguments)
    options = ChatOptions(**_parse(ChatOptions, normalise(arguments[:cut], {}), "chat"))
    sampling = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    with contextlib.ExitStack() as stack:
        url, key = options.url, options.api_key
        if options.spawn:
            config = parse_serve(arguments[cut:])
            any_port = [] if "port" in config.server.model_fields_set else ["--port", "0"]
            url = stack.enter_context(spawned_server(serve_command([*arguments[cut:], *any_port])))
            key = config.server.api_key.get_secret_value() if config.server.api_key else None
        return converse(ChatServer(url, key), make_console(), system=options.system, options=sampling)


def run_version(arguments: Sequence[str]) -> int:
    print(version("moe-serve"))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": run_serve,
    "chat": run_chat,
    "make-model": run_make_model,
    "version": run_version,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. The user's mistakes are one message and code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    name = {"--version": "version", "-V": "version"}.get(arguments[0], arguments[0])
    if name not in COMMANDS:
        print(f"moe-serve: unknown command {name!r}; known are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name](arguments[1:])
    except ConfigError as error:
        print(f"moe-serve: {error}", file=sys.stderr)
        return 2
    except MoEServeError as error:
        print(f"moe-serve: {error}", file=sys.stderr)
        return 1
