"""A launcher in a process of its own that joins a world: `python -m tests.support.second_launcher CONFIG TOKEN PART`.

PART is JSON of NodePart. It ends with the first of its children; its exit code is then that of the world's end.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys

import msgspec

from moe_serve.base.config import Config
from moe_serve.launch.node import Node
from moe_serve.launch.part import NodePart


def start(config: Config, token: str, part: NodePart) -> subprocess.Popen[bytes]:
    arguments = [config.to_json(), token, msgspec.json.encode(part).decode()]
    return subprocess.Popen([sys.executable, "-m", __name__, *arguments], stdin=subprocess.DEVNULL)


async def run(config: Config, token: str, part: NodePart) -> int:
    node = Node(config, part, token=token)
    try:
        await node.start()
        return (await node.until_ended()).code
    finally:
        await node.close()


if __name__ == "__main__":
    config, token, part = sys.argv[1:]
    sys.exit(asyncio.run(run(Config.model_validate_json(config), token, msgspec.json.decode(part, type=NodePart))))
