"""This rank's part in load balancing: counts its rows, fetches experts, switches maps. Decides nothing.

Between two steps, in this order: commit or give up what the step plan says, then go on with a stage; after a step,
count; when the plan says so, sum the counts over the expert-parallel ranks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_serve.base.commands import SetShares, StageExperts, StageStatus, StepPlan
from moe_serve.eplb.placement import Placement
from moe_serve.eplb.shares import table_of_rank
from moe_serve.model.moe.expert_map import slots_of_copies
from moe_serve.model.moe.layer import MoELayer
from moe_serve.parallel.collectives import Group
from moe_serve.worker.eplb.load_recorder import LoadRecorder
from moe_serve.worker.eplb.migrate import Migrator, Stage


@dataclass(frozen=True, slots=True)
class Collected:
    """`load` and `expert_seconds` as in StepResult; nothing in a step that does not collect."""

    load: bytes = b""
    expert_seconds: list[float] = field(default_factory=list)


class ExpertBalance:
    """`layers` of this rank's stage that have experts, by their number among all of the model that have: so they are
    called in records. `placement` of all of the model's.

    `migration` a group over the expert-parallel ranks of the stage that nothing else uses.
    """

    def __init__(
        self,
        layers: Mapping[int, MoELayer],
        placement: Placement,
        group: Group,
        migration: Group,
        *,
        max_bytes_per_step: int,
    ) -> None:
        self._layers = layers
        self._group = group
        self._placed = placement
        self._epoch = 0
        self._shares: dict[int, Tensor] = {}
        self._busy_seconds = 0.0
        self._expert_seconds = 0.0
        self._recorder = LoadRecorder(len(layers), placement.num_logical, group.device)
        self._migrator = Migrator(
            {number: layer.experts for number, layer in layers.items()},
            migration,
            placement.offsets,
            {number: placement.physical_to_logical_LP[number].tolist() for number in layers},
            max_bytes_per_step=max_bytes_per_step,
        )

    def before_step(self, plan: StepPlan) -> float:
        """What all ranks do before this step, and some progress with a stage. Seconds that a commit took."""
        seconds = 0.0
        if plan.commit_epoch:
            started = time.perf_counter()
            self._commit(plan.commit_epoch)
            seconds = time.perf_counter() - started
        if plan.drop_after_pieces >= 0:
            self._migrator.drop(plan.drop_after_pieces)
        if self._migrator.status is not None:
            started = time.perf_counter()
            self._migrator.poll()
            self._busy_seconds += time.perf_counter() - started
        return seconds

    def after_step(
        self, plan: StepPlan, routes: Sequence[Tensor], decode_S: Tensor, *, expert_seconds: float = 0.0
    ) -> Collected:
        """Count the step; the load of this stage's layers over all ranks, from rank 0, if the plan asks for it.

        `expert_seconds` of this rank in this step; 0 if not known.
        """
        self._recorder.add(routes, decode_S)
        self._expert_seconds += expert_seconds
        if not plan.collect_load or not self._layers:
            return Collected()
        load_N = self._recorder.take().flatten()
        nanoseconds_R = load_N.new_zeros(self._group.size)
        nanoseconds_R[self._group.rank] = int(1e9 * self._expert_seconds)
        self._expert_seconds = 0.0
        sum_N = self._group.all_reduce(torch.cat([load_N, nanoseconds_R])).cpu()
        if self._group.rank:
            return Collected()
        seconds = [each / 1e9 for each in sum_N[len(load_N) :].tolist()]
        return Collected(sum_N[: len(load_N)].numpy().tobytes(), seconds if any(seconds) else [])

    @torch.inference_mode()
    def stage(self, command: StageExperts) -> None:
        """Begin to fetch what the new placement of some layers needs, as far as they are of this stage."""
        rows = {layer: row for layer, row in command.rows.items() if layer in self._layers}
        self._shares = self._table(command, rows, layers=sorted(command.rows))
        self._migrator.begin(Stage(command.epoch, rows))
        self._busy_seconds = 0.0

    @torch.inference_mode()
    def set_shares(self, command: SetShares) -> None:
        """Other shares for the placement that is served; those of another placement come too late or too early."""
        if command.epoch != self._epoch:
            return
        rows = self._migrator.rows
        for layer, shares_EC in self._table(command, rows, layers=range(self._placed.num_layers)).items():
            self._map(layer, rows[layer], shares_EC)

    @torch.inference_mode()
    def poll(self) -> StageStatus:
        """Go on with a stage while no steps are run."""
        self._migrator.poll()
        return self.status() or StageStatus(epoch=0)

    def status(self) -> StageStatus | None:
        """How the stage under way stands; None when there is none."""
        status = self._migrator.status
        if status is None:
            return None
        return StageStatus(
            epoch=status.epoch,
            staged=status.staged,
            failed=status.failed,
            pieces_posted=status.pieces_posted,
            bytes_received=status.bytes_received,
            seconds=status.seconds,
            busy_seconds=self._busy_seconds,
        )

    def _commit(self, epoch: int) -> None:
        rows: Mapping[int, Sequence[int]] = self._migrator.commit(epoch)
        for layer, row in rows.items():
            self._map(layer, row, self._shares[layer])
        self._epoch, self._shares = epoch, {}

    def _map(self, layer: int, row: Sequence[int], shares_EC: Tensor) -> None:
        slots_EC = slots_of_copies(row, self._placed.num_logical, shares_EC.shape[1])
        self._layers[layer].expert_map.update(slots_EC.to(self._group.device), shares_EC)

    def _table(
        self, command: StageExperts | SetShares, rows: Mapping[int, Sequence[int]], *, layers: Sequence[int]
    ) -> dict[int, Tensor]:
        """This rank's cumulative shares (E, C) float32 of the layers in `rows`; the order is about `layers`."""
        table = table_of_rank(command, rows, self._placed, self._group.rank, layers=layers)
        return dict(zip(sorted(rows), torch.from_numpy(table).to(self._group.device), strict=True))
