"""A world whose front-end is in somebody else's process: its coordinator and engines, held by a process of their own.

That way nobody is taken for dead because of what the other process does with its interpreter. Started as
`python -m moe_serve.launch.world_process` with a WorldOrder on stdin; it says WorldOpened on stdout, and ends with
the world, or with the process that it was started for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

import msgspec

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.log import setup_logging
from moe_serve.base.messages import Stop
from moe_serve.launch.node import Node
from moe_serve.launch.part import NodePart

PARENT_SECONDS = 0.5
log = logging.getLogger("moe_serve.launch.world_process")  # run as __main__, which is no child of moe_serve


class WorldOrder(msgspec.Struct, frozen=True, kw_only=True):
    """`config` is Config.to_json(), resolved; `parent` the process id of whom the world is for."""

    token: str
    config: str
    parent: int


class WorldOpened(msgspec.Struct, frozen=True, kw_only=True):
    """Where the coordinator listens; or the operator's mistake that kept it from doing so."""

    host: str = ""
    port: int = 0
    mistake: str = ""


async def hold(config: Config, order: WorldOrder, told: int) -> int:
    """Until the world has ended; the exit code. `told` is a file descriptor for WorldOpened."""
    node = Node(config, NodePart(serve_http=False), token=order.token)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, node.end, Stop("asked to stop", 0))
    try:
        await node.start()
    except ConfigError as error:
        _say(told, WorldOpened(mistake=str(error)))
        return 2
    _say(told, WorldOpened(host=node.host, port=node.port))
    watching = asyncio.create_task(_watch_parent(node, order.parent))
    try:
        await node.until_ready()
        return (await node.until_ended()).code
    finally:
        watching.cancel()
        await node.close()


async def _watch_parent(node: Node, parent: int) -> None:
    """Its closed line would tell its death too, but for processes that it forked, which hold that line open."""
    while os.getppid() == parent:
        await asyncio.sleep(PARENT_SECONDS)
    node.end(Stop(f"process {parent}, which this world was for, is gone", 1))


def _say(told: int, opened: WorldOpened) -> None:
    with os.fdopen(told, "wb") as pipe:
        pipe.write(msgspec.json.encode(opened) + b"\n")


def main() -> int:
    told = os.dup(1)
    os.dup2(2, 1)  # whatever a child prints is for people
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=WorldOrder)
    config = Config.model_validate_json(order.config)
    setup_logging("launcher", config.server.log_level)
    return asyncio.run(hold(config, order, told))


if __name__ == "__main__":
    sys.exit(main())
