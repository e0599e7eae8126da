"""Decode steps in few calls: the operations of a whole forward pass, recorded once for each number of rows.

With few rows a step's time is Python's between the operations. They are the same in every step of so many single
tokens, so they are recorded the first time, and run again from then on (moe_kernels/recording.py): same operations,
same bits. One call for each phase that a layer enters, so that who hangs is named in the right place; where rows
travel, the exchange is called anew between them. For compiled kernels; all other steps run as ever.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import cast

import torch
from moe_kernels.recording import Recording, Workspace, record
from torch import Tensor

from moe_serve.model.attention.paged import PagedPlan
from moe_serve.model.context import ForwardContext, LayerKV
from moe_serve.model.decoder import Decoder
from moe_serve.model.layers.rope import Rotation

MAX_ROWS = 64
"""Above, Python is a small part of a step, and what a layer makes a large part of the memory."""
SPARE_BLOCKS = 4
"""Places for KV blocks of each sequence when a step is first recorded; twice as many whenever they are too few."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """A recording, the memory it reads what changes from, and where its result is."""

    recording: Recording
    kv: tuple[LayerKV, ...]
    x_TD: Tensor
    rotation: Rotation
    plan: PagedPlan
    out_TD: Tensor

    def fits(self, plan: PagedPlan, kv: tuple[LayerKV, ...]) -> bool:
        """Whether what such a step needs lies where this one has it, or has room there."""
        return kv is self.kv and len(plan.blocks) <= len(self.plan.blocks)

    def run(self, x_TD: Tensor, rotation: Rotation, plan: PagedPlan, ctx: ForwardContext) -> Tensor:
        """The result (T, D), good until the next recorded step, whatever its number of rows."""
        self.x_TD.copy_(x_TD)
        self.rotation.cos.copy_(rotation.cos)
        self.rotation.sin.copy_(rotation.sin)
        self.plan.slots_T.copy_(plan.slots_T)
        self.plan.sequences_S4.copy_(plan.sequences_S4)
        self.plan.blocks[: len(plan.blocks)].copy_(plan.blocks)
        self.recording.replay(ctx)
        return self.out_TD


class ReplayedDecoder:
    """`forward` as the decoder's own. `num_replayed` steps were replayed so far."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._workspace = Workspace()
        self._steps: dict[int, RecordedStep] = {}
        self._can = True
        self.num_replayed = 0

    def forward(self, token_ids_T: Tensor, ctx: ForwardContext, hidden_TD: Tensor | None = None) -> Tensor:
        """Hidden states (T, D), on the last stage good until the next call."""
        decoder, plan, num_rows = self._decoder, ctx.attention, len(token_ids_T)
        single = isinstance(plan, PagedPlan) and len(plan.sequences_S4) == num_rows
        if not (self._can and single and 0 < num_rows <= MAX_ROWS):
            return cast(Tensor, decoder(token_ids_T, ctx, hidden_TD))
        assert isinstance(plan, PagedPlan)
        x_TD, rotation = decoder.enter(token_ids_T, ctx, hidden_TD)
        step = self._steps.get(num_rows)
        if step is None or not step.fits(plan, ctx.kv):
            return self._record(x_TD, rotation, plan, ctx)
        self.num_replayed += 1
        out_TD = step.run(x_TD, rotation, plan, ctx)
        return out_TD if decoder.partition.is_last else out_TD.clone()  # which may still be on its way a step later

    def _record(self, x_TD: Tensor, rotation: Rotation, plan: PagedPlan, ctx: ForwardContext) -> Tensor:
        """This step, in memory that stays; and from now on all steps of as many rows."""
        blocks = torch.zeros(2 * len(plan.blocks) + SPARE_BLOCKS * len(x_TD), dtype=plan.blocks.dtype)
        blocks[: len(plan.blocks)] = plan.blocks
        kept = replace(plan, slots_T=plan.slots_T.clone(), blocks=blocks, sequences_S4=plan.sequences_S4.clone())
        x_TD, rotation = x_TD.clone(), Rotation(rotation.cos.clone(), rotation.sin.clone())
        with record(self._workspace) as recording:
            out_TD = self._decoder.through(x_TD, rotation, replace(ctx, attention=kept))
        if recording.missed:
            self._can = False
            self._steps.clear()
            log.info("steps are not replayed: between its operations this model needs %s", recording.missed)
        else:
            self._steps[len(x_TD)] = RecordedStep(recording, ctx.kv, x_TD, rotation, kept, out_TD)
        return out_TD.clone()
