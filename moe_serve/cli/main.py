"""The `moe-serve` command. Every option is generated from the fields in base/config.py; no flag is written here twice.

Where a value comes from, first wins: command line, `MOE_SERVE_*` environment, `--config file.yaml`, default.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, create_model
from pydantic_settings import CliPositionalArg

from moe_serve.base.config import SECTIONS, Config
from moe_serve.base.errors import ConfigError, MoEServeError
from moe_serve.base.registry import import_target
from moe_serve.cli.chat import ChatServer, converse, make_console
from moe_serve.cli.eplb import run_eplb
from moe_serve.cli.flags import Options, help_text, normalise, parse, spellings, wants_help
from moe_serve.cli.spawn import serve_command, spawned_server
from moe_serve.launch.serve import serve

USAGE = """usage: moe-serve COMMAND [OPTIONS]

commands:
  serve [MODEL]      serve a model over an OpenAI-compatible HTTP API
  chat               talk to a running server, or with --spawn to one of its own
  make-model DIR     write a small random-weight checkpoint
  eplb COMMAND       plan, replay and weigh expert placements on recorded loads
  version            print the version

`moe-serve COMMAND --help` lists a command's options."""
ABOUT_SERVE = (
    "Serve a model over an OpenAI-compatible HTTP API. Each option may also be given in the environment "
    "(MOE_SERVE_PORT=8000) or in a YAML file (--config); the command line wins, then the environment."
)


def serve_options() -> type[Options]:
    """One flat option class from the fields of all sections."""
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
    return create_model("ServeOptions", __base__=Options, **fields)


class MakeModelOptions(Options):
    folder: CliPositionalArg[Path] = Field(description="Folder to write; must be empty or absent, unless --force.")
    preset: Literal["tiny", "small"] = Field("tiny", description="Size of the model.")
    arch: Literal["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"] = Field("qwen3_moe", description="Architecture.")
    seed: int = Field(0, description="Seed of the random weights.")
    force: bool = Field(False, description="Replace the model in a folder that is not empty.")


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
    file = _config_path(normalise(known, arguments, "serve"))
    values = parse(known, arguments, "serve", _read_yaml(file, known))
    values.pop("config", None)
    return Config.from_flat(values)


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


def run_serve(arguments: Sequence[str]) -> int:
    if wants_help(arguments):
        groups = {title: section.model_fields for title, section in SECTIONS.items()}
        print(help_text(serve_options(), "serve", ABOUT_SERVE, groups))
        return 0
    return serve(parse_serve(arguments))


def run_make_model(arguments: Sequence[str]) -> int:
    if wants_help(arguments):
        print(help_text(MakeModelOptions, "make-model", "Write a small random-weight checkpoint."))
        return 0
    options = parse(MakeModelOptions, arguments, "make-model")
    # Reached by name: it needs torch, which the other commands must not wait for.
    make_model: Any = import_target("moe_serve.cli.random_model:make_model", "command", "make-model")
    folder: Path = make_model(**options, show_progress=True)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"wrote {size / 2**20:,.1f} MiB of random weights; serve them with: moe-serve serve {folder}")
    return 0


def run_chat(arguments: Sequence[str]) -> int:
    arguments = list(arguments)
    cut = arguments.index("--spawn") + 1 if "--spawn" in arguments else len(arguments)
    if wants_help(arguments[:cut]):
        print(help_text(ChatOptions, "chat", "Talk to a running server, or to one of its own."))
        return 0
    options = ChatOptions(**parse(ChatOptions, arguments[:cut], "chat"))
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
    "eplb": run_eplb,
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
