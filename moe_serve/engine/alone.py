"""The engine of a world of one rank: a core in this process, stepped by whoever calls it."""

from __future__ import annotations

from collections.abc import Callable

from moe_serve.base.commands import Meeting
from moe_serve.base.config import Config
from moe_serve.base.engine_messages import Generate, TokenEvent
from moe_serve.base.errors import ConfigError
from moe_serve.base.model_config import ModelConfig
from moe_serve.base.progress import Progress
from moe_serve.engine.build import build_core
from moe_serve.executor.choose import choose_executor
from moe_serve.world.member import threads_per_rank

OnEvent = Callable[[TokenEvent], bool]
"""Hears an event of a sequence; says whether the sequence has reached its end early."""


class OneEngine:
    """Nobody to meet, no sockets; `core` is there for whoever wants to look at each step.

    ConfigError for an executor whose workers would have to meet somebody.
    """

    def __init__(self, config: Config, model: ModelConfig) -> None:
        asked = config.parallel.distributed_executor_backend
        if asked in ("mp", "ray"):
            raise ConfigError(
                f"the {asked} executor is for the engines of a world, and one rank alone lives in this process; leave "
                "out distributed_executor_backend, or ask for several ranks"
            )
        meeting = Meeting.of_nobody(threads_per_rank(1))
        self._executor = choose_executor(config)(config, meeting, Progress())
        facts = self._executor.start()
        self.core = build_core(self._executor, config, model, facts, num_blocks=facts.kv_blocks)

    def run(self, sequences: list[Generate], on_event: OnEvent) -> None:
        """All sequences to their end (an error event if one failed); if anything raises, none stays in the core."""
        core = self.core
        names = [sequence.request_id for sequence in sequences]
        try:
            for sequence in sequences:
                core.add(sequence.request_id, sequence.token_ids, sequence.sampling)
            while core.has_work:
                for event in core.step():
                    if on_event(event) and event.finish_reason is None:
                        core.abort([event.request_id])
        except BaseException:
            core.abort(names)
            raise

    def close(self) -> None:
        self._executor.close()
