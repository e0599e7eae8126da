"""`moe-serve doctor`: is this machine fit, and the way to the others; how does the world of a running server stand?"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.secret import TOKEN_ENVIRONMENT
from moe_serve.base.section import ENVIRONMENT_PREFIX
from moe_serve.base.site import with_port, without_brackets
from moe_serve.cli.environment import check_environment
from moe_serve.cli.eplb import Parser
from moe_serve.cli.flags import variables
from moe_serve.cli.serve import serve_options
from moe_serve.doctor.calling import find_out
from moe_serve.doctor.finding import Finding, exit_code, failure, ok
from moe_serve.doctor.judge_machine import judge_machine
from moe_serve.doctor.judge_way import judge_way
from moe_serve.doctor.line import OPEN_TOKEN
from moe_serve.doctor.listening import Listener
from moe_serve.doctor.machine import read_machine
from moe_serve.doctor.ports import MAX_PORTS, RANDOM_PORTS
from moe_serve.doctor.world import WorldAnswered, ask_world, judge_world
from moe_serve.launch.part import given_token

ABOUT = (
    """Without a mode: checks this machine. Exit code 0 if nothing failed, 1 if something did, 2 for a wrong option."""
)
LISTEN_SECONDS = 600.0
MOST_SECONDS = 86_400.0
STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}
OF_MODES = {
    "machine": {"ports"},
    "listen": {"host", "port", "world_token_file", "seconds"},
    "peers": {"port", "ports", "world_token_file"},
    "server": {"api_key"},
}


def run_doctor(arguments: Sequence[str]) -> int:
    """The `doctor` command: 1 if a check failed. ConfigError for what cannot be asked."""
    options = _parser().parse_args(arguments)
    mode = "listen" if options.listen else "peers" if options.peers else "server" if options.server else "machine"
    given = {name for names in OF_MODES.values() for name in names if getattr(options, name) is not None}
    strange = sorted(given - OF_MODES[mode])
    if strange:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in strange)
        raise ConfigError(
            f"doctor: {flags} means nothing {'without a mode' if mode == 'machine' else f'with --{mode}'}"
        )
    return {"listen": _listen, "peers": _peers, "server": _server, "machine": _machine}[mode](options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="moe-serve doctor", description=ABOUT, allow_abbrev=False)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--listen", action="store_true", help="let doctors on other machines check the way here")
    modes.add_argument("--peers", metavar="HOST[:P],...", help="check the way to machines where a doctor listens")
    modes.add_argument("--server", metavar="URL", help="say how the world of a running server stands")
    port = Config().parallel.data_parallel_rpc_port
    parser.add_argument("--port", type=_port, metavar="P", help=f"where doctors listen; that of rank 0 [{port}]")
    parser.add_argument("--host", metavar="ADDRESS", help="with --listen: listen at this address only [all]")
    parser.add_argument(
        "--ports",
        type=_ports,
        metavar="P,...",
        help="ports that shall be free here; with --peers: shall be open both ways, beside random ones",
    )
    parser.add_argument("--seconds", type=float, metavar="S", help=f"--listen ends by itself [{LISTEN_SECONDS:g}]")
    parser.add_argument(
        "--world-token-file", metavar="FILE", help=f"the world's token, unless it is in {TOKEN_ENVIRONMENT}"
    )
    parser.add_argument("--api-key", metavar="KEY", help="that --server asks for, unless in MOE_SERVE_API_KEY")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port in [1, 65535]")
    return int(text)


def _ports(text: str) -> list[int]:
    ports = list(dict.fromkeys(_port(part.strip()) for part in text.split(",")))
    if len(ports) > MAX_PORTS - RANDOM_PORTS - 1:
        raise argparse.ArgumentTypeError(f"{len(ports)} ports are more than {MAX_PORTS - RANDOM_PORTS - 1}")
    return ports


def _machine(options: argparse.Namespace) -> int:
    config = Config()
    ports = options.ports or [config.server.port, config.parallel.data_parallel_rpc_port]
    facts = read_machine(ports, asked=options.ports is not None, misspelt=misspelt_variables())
    return _report(judge_machine(facts), options, facts=facts)


def misspelt_variables() -> list[str]:
    """A sentence for each variable with our prefix that `moe-serve serve` would refuse."""
    known, sentences = variables(serve_options()), []
    for name, value in sorted(os.environ.items()):
        try:
            check_environment({name: value}, ENVIRONMENT_PREFIX, known)
        except ConfigError as error:
            sentences.append(str(error))
    return sentences


def _listen(options: argparse.Namespace) -> int:
    seconds = LISTEN_SECONDS if options.seconds is None else options.seconds
    if not 0 < seconds <= MOST_SECONDS:
        raise ConfigError(f"--seconds must be in (0, {MOST_SECONDS:g}], not {seconds:g}")
    token = given_token(options.world_token_file)
    console = Console(stderr=True)
    port = options.port or Config().parallel.data_parallel_rpc_port
    listener = Listener(options.host or "", port, token=token or OPEN_TOKEN, tell=lambda line: _say(console, line))
    _say(console, f"listening at {with_port(options.host or '*', listener.port)} for {seconds:g} s; on the others run:")
    _say(console, f"    moe-serve doctor --peers THIS_MACHINE:{listener.port}")
    if not token:
        _say(console, f"without a token ({TOKEN_ENVIRONMENT} or --world-token-file) anybody may ask")
    try:
        came = listener.run(seconds)
    except KeyboardInterrupt:
        came = listener.num_came
    if came:
        return _report([ok("listening", f"{came} machines came")], options)
    told = (
        "either no doctor was started elsewhere, or this port cannot be reached",
        "look there: `--peers` says which",
    )
    return _report([failure("listening", "nobody came who knows the token", *told)], options)


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _peers(options: argparse.Namespace) -> int:
    token = given_token(options.world_token_file)
    default = options.port or Config().parallel.data_parallel_rpc_port
    peers = [parse_peer(text.strip(), default) for text in options.peers.split(",")]
    ways = [find_out(host, port, token=token, chosen=options.ports or ()) for host, port in peers]
    several = len(ways) > 1
    findings = [
        msgspec.structs.replace(each, check=f"{way.host}: {each.check}") if several else each
        for way in ways
        for each in judge_way(way)
    ]
    return _report(findings, options, facts=ways)


def parse_peer(text: str, default_port: int) -> tuple[str, int]:
    """HOST, HOST:P, [IPv6]:P or an IPv6 address by itself."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.endswith("]")):
        host, colon, port = text, "", ""
    host = without_brackets(host)
    if not host or (colon and (not port.isdecimal() or not 0 < int(port) < 65536)):
        raise ConfigError(f"{text!r} is no HOST or HOST:PORT (option --peers)")
    return host, int(port) if port else default_port


def _server(options: argparse.Namespace) -> int:
    key = options.api_key or os.environ.get(f"{ENVIRONMENT_PREFIX}API_KEY")
    answered = ask_world(options.server, key)
    if not options.json:
        _show_members(answered)
    return _report(judge_world(answered), options, facts=answered.body)


def _show_members(answered: WorldAnswered) -> None:
    if answered.body is None or answered.body.world is None:
        return
    table = Table(title="Members")
    for heading in ("member", "node", "state", "step", "phase", "in phase", "heard", "unfinished"):
        table.add_column(heading, justify="right" if heading in ("step", "in phase", "heard") else "left")
    for each in answered.body.world.members:
        table.add_row(
            escape(each.name),
            escape(each.node),
            each.state,
            str(each.step) if each.phase else "",
            escape(each.phase),
            f"{each.seconds_in_phase:.1f} s" if each.phase else "",
            f"{each.seconds_since_heard:.1f} s ago",
            "" if each.unfinished is None else str(each.unfinished),
        )
    _console().print(table)


def _report(findings: Sequence[Finding], options: argparse.Namespace, facts: object = None) -> int:
    code = exit_code(findings)
    if options.json:
        answer = {"ok": code == 0, "findings": findings, "facts": facts}
        sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
        return code
    console = _console()
    for each in findings:
        style, told = STYLES[each.level], f"; {each.means}" if each.level == "ok" and each.means else ""
        shown = f"[{style}]{each.level:>7}[/]  [bold]{escape(each.check)}[/]: {escape(each.found + told)}"
        console.print(shown, highlight=False)
        if each.level != "ok":
            console.print(f"         means: {escape(each.means)}\n         do: {escape(each.do)}", highlight=False)
    counts = {level: sum(each.level == level for each in findings) for level in STYLES}
    console.print(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['failure']} failures", highlight=False)
    return code


def _console() -> Console:
    return Console(file=sys.stdout, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
