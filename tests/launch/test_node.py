"""What a launcher does before it starts anybody."""

from __future__ import annotations

import asyncio
import resource

from moe_serve.base.config import Config
from moe_serve.base.messages import Stop
from moe_serve.launch.node import Node
from moe_serve.launch.part import NodePart


def test_a_launcher_and_so_its_children_may_open_as_many_files_as_the_system_lets_them() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[0]), before[1]))
    try:
        node = Node(Config(), NodePart(joins=False, dp_ranks=(0,), serve_http=False, serves=None))
        node.end(Stop("nothing is to be started", 0))
        asyncio.run(node.start())
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
