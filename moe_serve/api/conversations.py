"""Conversations rendered beside the event loop: short ones in a lane of their own, and nobody waits for ever.

A lane is a thread that waits for a template's process (text/rendering.py); it computes nothing itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from moe_serve.api.schemas import ChatBody, TokenizeBody
from moe_serve.base.errors import Overloaded
from moe_serve.text.chat_template import ChatPrompt, ChatTemplates

LONG_BYTES = 2**16
"""A larger body makes a long conversation."""
MAX_WAITING = 256
TURNS = 4
"""Who has waited for so many conversations that each took as long as one may is refused."""


RESTART_SECONDS = 10.0
"""More, for the process of a template that took too long to be replaced on a busy machine."""


class Lane:
    """One after the other, in order of arrival."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"{name} conversations")
        self._num_waiting = 0
        self._closed = False

    async def run(self, work: Callable[[], ChatPrompt], seconds: float) -> ChatPrompt:
        """Overloaded where too many wait, or this one has waited for so many seconds."""
        if self._num_waiting >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} conversations wait for the chat template", reason="queued_reqs")
        if self._closed:
            raise Overloaded("the server is shutting down")
        self._num_waiting += 1
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        try:
            async with asyncio.timeout(seconds):
                await asyncio.wait([future])
                if future.cancelled():
                    raise Overloaded("the server is shutting down")
                return future.result()
        except TimeoutError:
            future.cancel()
            raise Overloaded(
                f"the chat template was busy with other conversations for {seconds:g} s", reason="queued_reqs"
            ) from None
        finally:
            self._num_waiting -= 1

    def close(self) -> None:
        """What waits is given up."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)


class Conversations:
    """Renders those of requests. `seconds` one may take."""

    def __init__(self, templates: ChatTemplates, seconds: float) -> None:
        self._templates = templates
        self._seconds = seconds
        self._short, self._long = Lane("short"), Lane("long")

    async def render(self, body: ChatBody | TokenizeBody, num_bytes: int) -> ChatPrompt:
        """RequestError and Overloaded as ChatTemplates.render(). `num_bytes` of the body as it came."""
        hidden = isinstance(body, ChatBody) and body.tool_choice == "none"
        long = num_bytes > LONG_BYTES

        def render() -> ChatPrompt:
            return self._templates.render(
                body.messages or [],
                tools=None if hidden else body.tools,
                add_generation_prompt=body.add_generation_prompt is not False,
                options=body.chat_template_kwargs,
                long=long,
            )

        return await (self._long if long else self._short).run(render, TURNS * self._seconds + RESTART_SECONDS)

    def close(self) -> None:
        """End the templates' processes, whatever they do."""
        self._short.close()
        self._long.close()
        self._templates.close()
