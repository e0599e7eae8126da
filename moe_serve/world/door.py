"""The coordinator's door: who does not know the world's token is not listened to. One event loop."""

from __future__ import annotations

import asyncio
import logging

from moe_serve.base.log import limit_lines
from moe_serve.base.secret import new_nonce
from moe_serve.world.handshake import ANSWER_BYTES, REFUSAL, judge_answer
from moe_serve.world.link import PROOF_SECONDS

MAX_STRANGERS = 256
"""A world of thousands comes in waves of these; those dropped at the door try again."""
QUIET_SECONDS = 10.0
log = logging.getLogger(__name__)


class Door:
    """So many strangers at once, and no more, are asked for the `token`."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._strangers = 0
        limit_lines(__name__, burst=1, seconds=QUIET_SECONDS)

    async def admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether somebody who connected knows the token; of those who do not, no word is read."""
        if self._strangers >= MAX_STRANGERS:
            log.warning("dropped a connection: %d others have not said who they are", self._strangers)
            return False
        self._strangers += 1
        try:
            verdict = await self._ask(reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            verdict = REFUSAL
        finally:
            self._strangers -= 1
        if verdict == REFUSAL:
            log.warning("dropped %s, who does not know this world's token", writer.get_extra_info("peername"))
        return verdict != REFUSAL

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        nonce = new_nonce()
        writer.write(nonce)
        async with asyncio.timeout(PROOF_SECONDS):
            verdict = judge_answer(self._token, nonce, await reader.readexactly(ANSWER_BYTES))
        writer.write(verdict)
        return verdict
