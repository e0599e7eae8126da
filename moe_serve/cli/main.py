"""The `moe-serve` command: which command is meant, and how its errors look. Each command has a file of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from moe_serve.base.errors import ConfigError, MoEServeError
from moe_serve.cli.chat_command import run_chat
from moe_serve.cli.doctor import run_doctor
from moe_serve.cli.eplb import run_eplb
from moe_serve.cli.k8s import run_k8s
from moe_serve.cli.make_model import run_make_model
from moe_serve.cli.plan import run_plan
from moe_serve.cli.serve import run_serve

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


def run_version(arguments: Sequence[str]) -> int:
    print(version("moe-serve"))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": run_serve,
    "plan": run_plan,
    "doctor": run_doctor,
    "chat": run_chat,
    "make-model": run_make_model,
    "eplb": run_eplb,
    "k8s": run_k8s,
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
