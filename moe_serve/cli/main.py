"""The `moe-serve` command: which command is meant, and how its errors look. Each command has a file of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from types import MappingProxyType
from typing import cast

from moe_serve.base.errors import ConfigError, MoEServeError
from moe_serve.base.registry import import_target

USAGE = """usage: moe-serve COMMAND [OPTIONS]

commands:
  serve [MODEL]      serve a model over an OpenAI-compatible HTTP API
  plan [MODEL]       print what serve would start, where, and whether it fits
  doctor             check this machine, the way to others, the world of a running server
  chat               talk to a running server, or with --spawn to one of its own
  make-model DIR     write a small random-weight checkpoint
  eplb COMMAND       plan, replay and weigh expert placements on recorded loads
  k8s COMMAND        write manifests for Kubernetes, and a dashboard for Grafana
  version            print the version

`moe-serve COMMAND --help` lists a command's options."""


COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "serve": "moe_serve.cli.serve:run_serve",
        "plan": "moe_serve.cli.plan:run_plan",
        "doctor": "moe_serve.cli.doctor:run_doctor",
        "chat": "moe_serve.cli.chat_command:run_chat",
        "make-model": "moe_serve.cli.make_model:run_make_model",
        "eplb": "moe_serve.cli.eplb:run_eplb",
        "k8s": "moe_serve.cli.k8s:run_k8s",
        "version": "moe_serve.cli.main:run_version",
    }
)
"""Imported when one is meant: together they would take as long to import as a server's launcher alone."""


def run_version(arguments: Sequence[str]) -> int:
    print(version("moe-serve"))
    return 0


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
        run = cast(Callable[[Sequence[str]], int], import_target(COMMANDS[name], "command", name))
        return run(arguments[1:])
    except ConfigError as error:
        print(f"moe-serve: {error}", file=sys.stderr)
        return 2
    except MoEServeError as error:
        print(f"moe-serve: {error}", file=sys.stderr)
        return 1
