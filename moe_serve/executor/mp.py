"""One process per rank of an engine, started by the engine on its own machine."""

from __future__ import annotations

from moe_serve.base.commands import Meeting
from moe_serve.base.config import Config
from moe_serve.base.progress import Progress
from moe_serve.executor.remote import RemoteExecutor
from moe_serve.executor.subprocesses import Subprocesses


class MultiprocessExecutor(RemoteExecutor):
    """Several ranks without further ado."""

    def __init__(self, config: Config, meeting: Meeting, progress: Progress) -> None:
        super().__init__(config, meeting, progress, Subprocesses())
