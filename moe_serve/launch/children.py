"""The processes that one launcher started, and what is left of its world on this machine."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from moe_serve.base.interpreter import module_command
from moe_serve.launch.shared import SharedThings
from moe_serve.world.member import MemberSpec, end_all, started

STOP_SECONDS = 3.0
FATE_SECONDS = 1.0
"""Until a child is known to have ended; of an actor Ray says it a little later."""


class Child(Protocol):
    """What a launcher started, as far as it can follow it."""

    @property
    def name(self) -> str: ...

    @property
    def code(self) -> int | None:
        """None while it runs, minus the signal where one killed it."""
        ...

    @property
    def fate(self) -> str:
        """How it ended, for people."""
        ...

    def ask(self) -> None:
        """To end, by who has nobody else to be told by."""
        ...

    def kill(self) -> None:
        """End it at once, and see it gone."""
        ...


@dataclass(frozen=True, slots=True)
class ChildProcess:
    """A Child that is a process of this machine."""

    name: str
    process: subprocess.Popen[bytes]

    @property
    def code(self) -> int | None:
        return self.process.poll()

    @property
    def fate(self) -> str:
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return f"{self.name} (pid {self.process.pid}) {how}"

    def ask(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Children:
    """Of one node of one world. Its descendants are found by what they were told, whoever their parent is."""

    def __init__(self, *, token: str, node: str) -> None:
        self._token, self._node = token, node
        self._children: list[Child] = []

    def start(
        self,
        name: str,
        module: str,
        spec: MemberSpec,
        shared: SharedThings | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`shared` is for API servers; `environment` what else is told."""
        # A session of its own: Ctrl-C in the terminal reaches the launcher only, which then drains.
        process = subprocess.Popen(
            module_command(module),
            env={**spec.to_environment(), **environment, **({} if shared is None else shared.environment)},
            pass_fds=() if shared is None else shared.pass_fds,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
        )
        self._children.append(ChildProcess(name, process))

    def add(self, child: Child) -> None:
        """One that was started in another way."""
        self._children.append(child)

    def ended(self) -> Iterator[Child]:
        """Those that run no more."""
        return (child for child in self._children if child.code is not None)

    async def fates(self) -> str:
        """Which children were killed, and by which signal; a death is known a moment before its signal."""
        deadline = time.monotonic() + FATE_SECONDS
        while time.monotonic() < deadline and not any(self.ended()):
            await asyncio.sleep(0.02)
        return "; ".join(child.fate for child in self.ended() if (child.code or 0) < 0)

    async def close(self, welcomed: Collection[tuple[str, int]] | None) -> None:
        """Give them a few seconds to end, then end them.

        `welcomed` (host, pid) have been told to stop, the others hear nothing; None: told by whoever holds the
        coordinator, or by nobody, so each is asked once more.
        """
        if welcomed is None:
            for child in self._children:
                child.ask()
        else:
            here = socket.gethostname()
            end_all(pid for pid in self._all_here() if (here, pid) not in welcomed)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and self._is_somebody_left():
            await asyncio.sleep(0.05)
        self.kill()

    def kill(self) -> None:
        """End what is left at once, workers that have not joined yet included."""
        for child in self._children:
            if child.code is None:
                child.kill()
        end_all(self._all_here())

    def _is_somebody_left(self) -> bool:
        return any(child.code is None for child in self._children) or bool(self._all_here())

    def _all_here(self) -> list[int]:
        """Children and theirs."""
        return started(lambda spec: spec.token == self._token and spec.site.node == self._node)
