"""Questions of a Rebalancer worked out in a process of their own, so that nothing a policy does stops an event loop.

The process is started for the first question, or before it where that is certain to come. Whatever happens to it is a
reason why a question has no answer; the next question gets a new process.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable

from moe_serve.base.interpreter import child_environment, module_command
from moe_serve.base.parcel import PIECE_BYTES, Parcel
from moe_serve.eplb.questions import Question, Solved, Unsolved
from moe_serve.world.member import thread_environment
from moe_serve.world.solver_wire import HEADER, decode_head, encode_question

SOLVE_SECONDS = 300.0
"""A policy that takes longer is ended: its answer would be about traffic of long ago."""
GONE_SECONDS = 1.0


class Solver:
    """`run()` answers what `ask()` was given, in order; `on_solved` hears every answer in the event loop's thread."""

    def __init__(
        self, on_solved: Callable[[Solved], None], *, limit: float = SOLVE_SECONDS, early: bool = False
    ) -> None:
        self._on_solved = on_solved
        self._limit = limit
        self._early = early
        self._questions: asyncio.Queue[Question] = asyncio.Queue()
        self._process: asyncio.subprocess.Process | None = None
        self._busy = False

    def ask(self, question: Question, *, alone: bool = False) -> None:
        """Have a question worked out. `alone`: what is being worked out is given up, as nobody needs it any more."""
        if alone and self._busy:
            self._kill()
        self._questions.put_nowait(question)

    async def run(self) -> None:
        """For ever; cancelled, it ends its process."""
        try:
            if self._early:
                with contextlib.suppress(OSError):  # the first question will say so
                    await self._running()
            while True:
                question = await self._questions.get()
                self._busy = True
                solved = await self._solved(question)
                self._busy = False
                self._on_solved(solved)
        finally:
            process = self._process
            self._kill()
            if process is not None:
                await process.wait()

    async def _solved(self, question: Question) -> Solved:
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._limit):
                return await self._exchange(question)
        except TimeoutError:
            reason = f"it took longer than {self._limit:g} s"
            self._kill()
        except asyncio.IncompleteReadError:
            reason = f"the process that works it out {await self._fate()}"
        except OSError as error:
            reason = f"the process that works it out cannot be reached: {error}"
            self._kill()
        return Solved(question.number, time.monotonic() - started, Unsolved(reason))

    async def _exchange(self, question: Question) -> Solved:
        process = await self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        for piece in Parcel.of(encode_question(question)):
            process.stdin.write(piece)
            await process.stdin.drain()
        (length,) = HEADER.unpack(await process.stdout.readexactly(HEADER.size))
        head = decode_head(await process.stdout.readexactly(length))
        bodies = tuple([await _parcel(process.stdout, size) for size in head.sizes])
        return Solved(head.number, head.seconds, head.result, bodies)

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *module_command("moe_serve.world.solver_process"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={**child_environment(), **thread_environment(1)},
                start_new_session=True,
            )
        return self._process

    async def _fate(self) -> str:
        """How the process ended, for people."""
        process, self._process = self._process, None
        if process is None:
            return "was ended: something else is more urgent"
        try:
            code = await asyncio.wait_for(process.wait(), GONE_SECONDS)
        except TimeoutError:
            process.kill()
            return "closed its output"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


async def _parcel(source: asyncio.StreamReader, size: int) -> Parcel:
    whole, rest = divmod(size, PIECE_BYTES)
    sizes = [PIECE_BYTES] * whole + [rest] * bool(rest)
    return Parcel(tuple([await source.readexactly(each) for each in sizes]))
