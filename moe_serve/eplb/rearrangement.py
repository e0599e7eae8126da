"""A rearrangement of experts as data: what is planned, how it is cut into chunks, how far it is. Pure; numpy only.

Shape letters: L layers, E logical experts, P physical slots, C most copies of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moe_serve.base.balance_messages import DropStage, Record, StageReport
from moe_serve.base.commands import SetShares, StageExperts
from moe_serve.base.parcel import Parcel
from moe_serve.eplb.desk.plan import layers_by_gain
from moe_serve.eplb.placement import Placement
from moe_serve.eplb.policies.base import Floats
from moe_serve.eplb.saving import Saving

Order = StageExperts | SetShares | DropStage | Record
MAX_CHUNK_BYTES = 64 << 20
"""Shadow rows of one chunk on any rank, unless a single layer needs more."""


@dataclass(frozen=True, slots=True)
class ForEngine:
    """An order for one engine; a parcel holds one that is encoded already."""

    dp: int
    order: Order | Parcel


@dataclass(frozen=True, slots=True)
class Proposal:
    """A placement and what it is expected to bring. `gain`: the share by which the slowest ranks' rows would fall.

    It starts from what is served since `epoch`, and is carried out in `chunks` of layers. In a layer,
    `moves_of_layers[layer]` slots get an expert that is new to their rank. `saving` where the parts of the window were
    known: what the gain amounts to in time.
    """

    epoch: int
    placement: Placement
    balancedness_before: float
    balancedness_after: float
    gain: float
    moves_of_layers: list[int]
    num_bytes: int
    chunks: list[list[int]]
    saving: Saving | None = None

    @property
    def num_moves(self) -> int:
        return sum(self.moves_of_layers)


@dataclass(slots=True)
class Chunk:
    epoch: int
    layers: list[int]
    last_news: float
    staged: set[int] = field(default_factory=set)
    done: dict[int, StageReport] = field(default_factory=dict)
    dropping: str = ""
    """Why it is being given up."""
    reason: str = ""
    """The same in one word, for the metrics."""


@dataclass(slots=True)
class Rearrangement:
    plan: Proposal
    before: Placement
    chunks: list[list[int]]
    started: float
    step: int
    why: str
    chunk: Chunk | None = None
    num_chunks: int = 0
    """Committed so far."""
    num_moves: int = 0
    stage_seconds: float = 0.0
    commit_seconds: float = 0.0
    bytes_received: int = 0


def chunks_of(old: Placement, new: Placement, load_LE: Floats, expert_bytes: int) -> list[list[int]]:
    """Layers that change, those that gain most per moved expert first, in chunks of bounded shadow rows."""
    different_LP = old.physical_to_logical_LP != new.physical_to_logical_LP
    chunks: list[list[int]] = []
    room = 0
    for layer in layers_by_gain(old, new, load_LE):
        rows = int(np.bincount(new.rank_of_slot()[different_LP[layer]], minlength=1).max())
        if not chunks or rows * expert_bytes > room:
            chunks.append([])
            room = MAX_CHUNK_BYTES
        chunks[-1].append(layer)
        room -= rows * expert_bytes
    return chunks
