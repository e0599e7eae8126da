"""One rank of a supervisor: what `moe-serve serve --data-parallel-rank R` does, with options that the supervisor gives.

Started as `python -m moe_serve.launch.rank_process` with a RankOrder on stdin; it ends with its supervisor.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import replace

import msgspec

from moe_serve.base.config import Config
from moe_serve.base.model_config import ModelConfig
from moe_serve.base.parallel_config import ParallelConfig
from moe_serve.launch.part import node_part
from moe_serve.launch.serve import run_resolved, serve_worlds

PARENT_SECONDS = 0.5
OF_THE_NODE = {
    "data_parallel_multi_port_external_lb",
    "data_parallel_supervisor_port",
    "data_parallel_size_local",
    "data_parallel_start_rank",
    "node_rank",
    "restart_world",
}
"""Options that are the supervisor's own."""


class RankOrder(msgspec.Struct, frozen=True, kw_only=True):
    """`config` is Config.to_json() with keys; `supervisor` a process id. `machine` and `launchers` as in NodePart;
    `worlds` in which this rank was before."""

    config: str
    token: str
    supervisor: int
    machine: str
    launchers: int
    worlds: int


def rank_config(config: Config, rank: int) -> Config:
    """Of one of the ranks that the supervisor of `config` starts: an option given to the node is given to each."""
    parallel = config.parallel
    place = parallel.dp_ranks_here.index(rank)
    given = {name: getattr(parallel, name) for name in parallel.model_fields_set - OF_THE_NODE}
    own = ParallelConfig(**given, data_parallel_rank=rank, data_parallel_rank_local=place)
    return config.model_copy(update={"parallel": own}).with_("server", port=config.server.port + place)


def main() -> int:
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=RankOrder)
    threading.Thread(target=_end_with, args=(order.supervisor,), daemon=True).start()
    config = Config.model_validate_json(order.config)
    part = replace(node_part(config.parallel), machine=order.machine, launchers=order.launchers)

    async def run(resolved: Config, _model: ModelConfig) -> int:
        return await serve_worlds(resolved, part, order.token, worlds=order.worlds)

    return run_resolved(config, f"launcher dp {config.parallel.data_parallel_rank}", run)


def _end_with(supervisor: int) -> None:
    """Without it nobody asks for this rank's answers any more, and its port is wanted: as two signals, end at once."""
    while os.getppid() == supervisor:
        time.sleep(PARENT_SECONDS)
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PARENT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
