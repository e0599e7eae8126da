"""No task of the API server ends unnoticed: what fails is named, and the server ends for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from moe_serve.api.server import ApiServer
from moe_serve.base.config import Config
from moe_serve.base.messages import Drain, Stop
from moe_serve.base.site import Site
from moe_serve.world.member import MemberSpec


async def forever() -> None:
    await asyncio.Event().wait()


async def once() -> None:
    return


async def broken() -> None:
    raise KeyError("lost")


def ending(
    *tasks: Callable[[], Awaitable[None]], serving: Callable[[], Awaitable[None]] = forever, order: Drain | None = None
) -> Stop | Drain:
    """How a server ends whose tasks do this."""

    async def scenario() -> Stop | Drain:
        config = Config()
        spec = MemberSpec(host="127.0.0.1", port=1, token="t" * 16, config=config.to_json(), dp=-1, site=Site())
        server = ApiServer(spec)
        started = [asyncio.ensure_future(task()) for task in (serving, *tasks)]
        if order is not None:
            server._orders.put_nowait(order)
        named = {f"task {number}": task for number, task in enumerate(started[1:], 1)}
        try:
            return await asyncio.wait_for(server._until_ordered(started[0], named), 5)
        finally:
            for task in started:
                task.cancel()
            await asyncio.gather(*started, return_exceptions=True)
            server._engines.close()

    return asyncio.run(scenario())


def test_a_task_that_fails_ends_the_server_and_is_named() -> None:
    for tasks in ((broken, forever), (once, forever, broken)):
        stop = ending(*tasks)
        assert isinstance(stop, Stop)
        assert stop.code == 1
        assert f"task {tasks.index(broken) + 1}: KeyError: 'lost'" in stop.reason


def test_an_http_server_that_fails_ends_the_server_and_one_that_ends_is_an_orderly_end() -> None:
    failed, ended = ending(forever, serving=broken), ending(forever, serving=once)
    assert isinstance(failed, Stop)
    assert (failed.code, "the HTTP server" in failed.reason) == (1, True)
    assert isinstance(ended, Stop)
    assert ended.code == 0


def test_an_order_is_followed_while_all_tasks_go_on() -> None:
    assert ending(once, forever, order=Drain(3)) == Drain(3)
