"""The launchers that a supervisor started, one for each rank of its node: processes, and whether they are ready."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException

import msgspec

from moe_serve.base.config import Config
from moe_serve.base.interpreter import child_environment, module_command
from moe_serve.base.site import with_port
from moe_serve.launch.children import ChildProcess
from moe_serve.launch.ports import PortPlan, ports_of_ranks
from moe_serve.launch.rank_process import RankOrder, rank_config
from moe_serve.world.member import end_all, started

ANSWER_SECONDS = 2.0
ANSWER_BYTES = 65536
LOOPBACK = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a supervisor says of a rank: `reason` why it is not ready, None if it is. `pid` of its launcher."""

    rank: int
    port: int
    pid: int
    ready: bool
    reason: str | None


@dataclass(frozen=True, slots=True)
class RankLauncher:
    """The process that serves one rank at one port."""

    rank: int
    port: PortPlan
    child: ChildProcess


class RankLaunchers:
    """Of one node, one world after the other. `config` is the supervisor's, resolved; `machine` its name."""

    def __init__(self, config: Config, *, token: str, machine: str) -> None:
        self._config, self._token, self._machine = config, token, machine
        self.ports = ports_of_ranks(config, config.parallel.dp_ranks_here)
        self._launchers: list[RankLauncher] = []

    def start(self, worlds: int) -> None:
        """Every rank of the node, which has been in so many `worlds` before."""
        self._launchers = [
            RankLauncher(rank, port, ChildProcess(f"rank {rank}", self._launch(rank, worlds)))
            for rank, port in self.ports.items()
        ]

    def _launch(self, rank: int, worlds: int) -> subprocess.Popen[bytes]:
        order = RankOrder(
            config=rank_config(self._config, rank).to_json(keys=True),
            token=self._token,
            supervisor=os.getpid(),
            machine=self._machine,
            launchers=len(self.ports),
            worlds=worlds,
        )
        # A session of its own: Ctrl-C in the terminal reaches the supervisor only, which passes it on.
        process = subprocess.Popen(
            module_command("moe_serve.launch.rank_process"),
            env=child_environment(),
            start_new_session=True,
            stdin=subprocess.PIPE,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as told:
            told.write(msgspec.json.encode(order))
        return process

    def ended(self) -> Iterator[RankLauncher]:
        """Those that run no more."""
        return (each for each in self._launchers if each.child.code is not None)

    def running(self) -> list[RankLauncher]:
        return [each for each in self._launchers if each.child.code is None]

    def codes(self) -> list[int]:
        """Exit codes of those that have ended, minus the signal where one killed it."""
        return [code for each in self._launchers if (code := each.child.code) is not None]

    def ask(self) -> None:
        """Ask them to stop: the first time they drain."""
        for each in self.running():
            each.child.ask()

    def kill(self) -> None:
        """End what is left at once, whatever they have started included."""
        for each in self.running():
            each.child.kill()
        end_all(started(lambda spec: spec.token == self._token and spec.site.machine == self._machine))

    async def reports(self) -> list[RankReport]:
        """Ask all of them now; within a few seconds, whoever does not answer."""
        return list(await asyncio.gather(*(asyncio.to_thread(_report, each) for each in self._launchers)))


def _report(launcher: RankLauncher) -> RankReport:
    port = launcher.port
    reason = _why_not_ready(port.host, port.port) if launcher.child.code is None else launcher.child.fate
    pid = launcher.child.process.pid
    return RankReport(rank=launcher.rank, port=port.port, pid=pid, ready=reason is None, reason=reason)


def _why_not_ready(host: str, port: int) -> str | None:
    """In the words of the rank's own /readyz; None if it is ready."""
    connection = HTTPConnection(LOOPBACK.get(host, host), port, timeout=ANSWER_SECONDS)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/readyz")
            answer = connection.getresponse()
            body = answer.read(ANSWER_BYTES)
        except ConnectionRefusedError:
            return "does not listen yet"
        except (OSError, HTTPException) as error:
            return f"does not answer at {with_port(host, port)}: {error or type(error).__name__}"
    if answer.status == 200:
        return None
    try:
        return str(msgspec.json.decode(body)["reason"])
    except (msgspec.DecodeError, LookupError, TypeError):
        return f"answers with status {answer.status}"
