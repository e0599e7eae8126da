"""An executor that writes down, after each commit of a rearrangement, to which copies of experts its rank sends rows.

Named by --distributed-executor-backend; TEST_WATCH holds a folder, which gets a file for each DP rank: JSON, for each
layer and expert the slots that get a share of the rows.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path

from moe_serve.base.commands import Command, Meeting, Reply, StepPlan
from moe_serve.base.config import Config
from moe_serve.base.progress import Progress
from moe_serve.executor.uni import UniExecutor
from moe_serve.model.moe.layer import MoELayer

ENVIRONMENT = "TEST_WATCH"


class WatchedExecutor(UniExecutor):
    def __init__(self, config: Config, meeting: Meeting, progress: Progress) -> None:
        super().__init__(config, meeting, progress)
        self._file = Path(os.environ[ENVIRONMENT]) / f"dp-{meeting.dp_rank}.json"

    def submit(self, command: Command) -> Future[Reply]:
        reply = super().submit(command)
        if isinstance(command, StepPlan) and command.commit_epoch:
            assert self._worker is not None
            assert self._worker._decoder is not None
            part = self._file.with_suffix(".part")
            part.write_text(json.dumps([chosen_slots(layer) for layer in self._worker._decoder.moe_layers()]))
            part.rename(self._file)
        return reply


def chosen_slots(layer: MoELayer) -> list[list[int]]:
    """For each expert the slots of the copies that get some of this rank's rows."""
    slots_EC, shares_EC = layer.expert_map.slots_EC, layer.expert_map.shares_EC
    assert slots_EC is not None
    assert shares_EC is not None
    found = []
    for slots, shares in zip(slots_EC.tolist(), shares_EC.tolist(), strict=True):
        found.append(
            [slot for slot, (before, upto) in zip(slots, pairwise([0.0, *shares]), strict=True) if upto > before]
        )
    return found
