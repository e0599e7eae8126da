"""An executor whose engine loses some requests, as a bug of ours might: accepted, and then known to nobody.

Named by --distributed-executor-backend. A prompt that begins with FORGOTTEN is lost; every step that computes something
takes STEP_SECONDS, so that others wait honestly.
"""

from __future__ import annotations

import time
from concurrent.futures import Future

from moe_serve.base.commands import Command, Meeting, Reply, StepPlan
from moe_serve.base.config import Config
from moe_serve.base.progress import Progress
from moe_serve.base.sampling import SamplingParams
from moe_serve.engine.core import EngineCore
from moe_serve.executor.uni import UniExecutor

FORGOTTEN = 66
STEP_SECONDS = 0.2


class ForgetfulExecutor(UniExecutor):
    """On every rank."""

    def __init__(self, config: Config, meeting: Meeting, progress: Progress) -> None:
        super().__init__(config, meeting, progress)
        add = EngineCore.add

        def forget(
            core: EngineCore, request_id: str, token_ids: list[int], sampling: SamplingParams, *, group: str = ""
        ) -> None:
            if token_ids[0] != FORGOTTEN:
                add(core, request_id, token_ids, sampling, group=group)

        EngineCore.add = forget  # type: ignore[method-assign, assignment]

    def submit(self, command: Command) -> Future[Reply]:
        if isinstance(command, StepPlan) and command.scheduled:
            time.sleep(STEP_SECONDS)
        return super().submit(command)
