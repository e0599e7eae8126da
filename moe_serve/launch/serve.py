"""`moe-serve serve`: a node, what signals mean to it, and the line that says it is ready."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import signal
import sys

from moe_serve.base.config import Config
from moe_serve.base.errors import ConfigError
from moe_serve.base.log import setup_logging
from moe_serve.base.model_config import ModelConfig
from moe_serve.launch.node import Node, NodePart
from moe_serve.launch.resolve import resolve

log = logging.getLogger(__name__)


def serve(config: Config) -> int:
    """`moe-serve serve`: run until told to stop or broken; the exit code."""
    setup_logging("launcher", config.server.log_level)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until there is something to drain
    try:
        resolved, model = resolve(config)
        return asyncio.run(_serve(resolved, model))
    except ConfigError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        return 130


async def _serve(config: Config, model: ModelConfig) -> int:
    node = Node(config, NodePart())
    _on_signals(node)
    log.info("%s", describe(config, model))
    await node.start()
    try:
        await node.until_ready()
        if node.ended is None:
            print(ready_line(config, node.front_door()), flush=True)
        stop = await node.until_ended()
        if stop.code == 1:
            fates = await node.fates()
            log.error("%s%s", stop.reason, f" [{fates}]" if fates and fates not in stop.reason else "")
        elif stop.code:
            log.error("%s", stop.reason)
        else:
            log.info("stopped: %s", stop.reason)
        return stop.code
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
    dense = f" and {num_dense} dense" if num_dense else ""
    return (
        f"{config.model.served_model_name}: {model.architecture}, {len(model.moe_layers)} layers x {model.num_experts} "
        f"experts{dense}, top-{model.top_k}, {config.model.dtype}; data parallel {parallel.data_parallel_size} x "
        f"tensor parallel {parallel.tensor_parallel_size}, {experts}"
    )


def ready_line(config: Config, address: str) -> str:
    """A curl line that works as it stands (given the key, where one is needed). `address` is host:port."""
    body = json.dumps({"model": config.model.served_model_name, "prompt": "In the beginning", "max_tokens": 32})
    host, _, port = address.rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    host = f"[{host}]" if ":" in host else host
    key = ' -H "Authorization: Bearer $MOE_SERVE_API_KEY"' if config.server.api_key else ""
    return f"curl http://{host}:{port}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"
