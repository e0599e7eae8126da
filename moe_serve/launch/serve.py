"""`moe-serve serve`: a node, what signals mean to it, and the line that says it is ready."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Coroutine

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError, MissingExtra
from moe_serve.base.launched import check_served
from moe_serve.base.log import setup_logging
from moe_serve.base.model_config import ModelConfig
from moe_serve.launch.endings import Pauses, exit_code
from moe_serve.launch.node import Node
from moe_serve.launch.part import NodePart, node_part, world_token
from moe_serve.launch.resolve import resolve

log = logging.getLogger(__name__)


def serve(config: Config) -> int:
    """`moe-serve serve`: run until told to stop or broken; the exit code."""

    async def run(resolved: Config, model: ModelConfig) -> int:
        log.info("%s", describe(resolved, model))
        return await serve_worlds(resolved, node_part(resolved.parallel), world_token(resolved.parallel))

    return run_resolved(config, "launcher", run)


def run_resolved(config: Config, name: str, run: Callable[[Config, ModelConfig], Coroutine[None, None, int]]) -> int:
    """What `run` gives for the resolved `config` in an event loop; the operator's mistakes are a line and code 2.
    `name` is that of this process in the log."""
    setup_logging(name, config.server.log_level)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until there is something to drain
    try:
        check_served(config.parallel)
        resolved, model = resolve(config)
        return asyncio.run(run(resolved, model))
    except (ConfigError, MissingExtra) as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        return 130


async def serve_worlds(config: Config, part: NodePart, token: str, *, worlds: int = 0) -> int:
    """One world, or with --restart-world one after the other; the exit code. `worlds` in which this part was before."""
    pauses = Pauses()
    while True:
        begun = time.monotonic()
        node = Node(config, part, token=token, worlds=worlds)
        code = await _serve(node)
        if code in (0, 2) or node.asked_to_stop or not config.parallel.restart_world:
            return code
        worlds = max(worlds, node.world_number)
        pause = pauses.after(time.monotonic() - begun)
        log.info("starting this node's part of the next world in %g s (--restart-world)", pause)
        await asyncio.sleep(pause)
        if node.asked_to_stop:  # while nothing ran
            return 0


async def _serve(node: Node) -> int:
    """One world to its end; the exit code."""
    _on_signals(node)
    try:
        await node.start()
        await node.until_ready()
        if node.ended is None:
            log.info("world %d is ready", node.world_number)
            if door := node.front_door():
                print(ready_line(node.config, door), flush=True)
        stop = await node.until_ended()
        code = exit_code(stop, node.name, asked=node.asked_to_stop)
        if stop.code == 1:
            fates = await node.fates()
            log.error("%s%s", stop.reason, f" [{fates}]" if fates and fates not in stop.reason else "")
        elif stop.code:
            log.error("%s", stop.reason if code == stop.code else f"ended by the node {stop.node}: {stop.reason}")
        else:
            log.info("stopped: %s", stop.reason)
        return code
    finally:
        await node.close()


def _on_signals(node: Node) -> None:
    """The first SIGTERM or Ctrl-C drains, the second of either ends at once, with the exit code of its signal."""
    asked = 0

    def handle(number: signal.Signals) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            log.warning("%s again: ending at once", number.name)
            node.kill()
            os._exit(128 + number)
        timeout = node.config.server.shutdown_timeout
        log.info(
            "%s: finishing what is in flight (at most %g s, --shutdown-timeout; a second one ends at once)",
            number.name,
            timeout,
        )
        node.drain(timeout)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle, number)


def describe(config: Config, model: ModelConfig) -> str:
    """One line that says what is being started."""
    parallel = config.parallel
    experts = (
        f"experts spread over {parallel.topology.ep} ranks ({parallel.expert_placement_strategy}, "
        f"{parallel.all2all_backend})"
        if parallel.enable_expert_parallel
        else f"every expert cut over {parallel.topology.ep} ranks"
    )
    num_dense = model.num_layers - len(model.moe_layers)
    stages = f"pipeline parallel {parallel.pipeline_parallel_size} x " if parallel.pipeline_parallel_size > 1 else ""
    nodes = f" over {parallel.nnodes} nodes" if parallel.is_spread else ""
    dense = f" and {num_dense} dense" if num_dense else ""
    sharing = parallel.decode_context_parallel_size
    shared = f" (KV cache shared by {sharing})" if sharing > 1 else ""
    return (
        f"{config.model.served_model_name}: {model.architecture}, {len(model.moe_layers)} layers x {model.num_experts} "
        f"experts{dense}, top-{model.top_k}, {config.model.dtype}; data parallel {parallel.data_parallel_size} x "
        f"{stages}tensor parallel {parallel.tensor_parallel_size}{shared}{nodes}, {experts}"
    )


def ready_line(config: Config, address: str) -> str:
    """A curl line that works as it stands (given the key, where one is needed). `address` as with_port() writes it."""
    body = json.dumps({"model": config.model.served_model_name, "prompt": "In the beginning", "max_tokens": 32})
    host, _, port = address.rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    key = ' -H "Authorization: Bearer $MOE_SERVE_API_KEY"' if config.server.api_key else ""
    return f"curl http://{host}:{port}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
