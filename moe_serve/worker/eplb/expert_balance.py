"""This rank's part in load balancing: counts its rows, fetches experts, switches maps. Decides nothing.

Between two steps, in this order: commit or give up what the step plan says, then go on with a stage; after a step,
count; when the plan says so, sum the counts over the expert-parallel ranks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moe_serve.base.commands import SetShares, StageExperts, StageStatus, StepPlan
from moe_serve.eplb.placement import Placement
from moe_serve.eplb.shares import layers_of, table_of_rank
from moe_serve.model.moe.expert_map import slots_of_copies
from moe_serve.model.moe.layer import MoELayer
from moe_serve.parallel.collectives import Group
from moe_serve.worker.eplb.load_recorder import LoadRecorder
from moe_serve.worker.eplb.migrate import Migrator, Stage


class ExpertBalance:
    """`layers` those of the model that have experts, in order: a layer's number here and in all records is among them.

    `migration` a group over the expert-parallel ranks that nothing else uses.
    """

    def __init__(
        self,
        layers: Sequence[MoELayer],
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
        self._recorder = LoadRecorder(len(layers), placement.num_logical, group.device)
        self._migrator = Migrator(
            [layer.experts for layer in layers],
            migration,
            placement.offsets,
            placement.physical_to_logical_LP.tolist(),
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
        self._migrator.poll()
        return seconds

    def after_step(self, plan: StepPlan, routes: Sequence[Tensor], decode_S: Tensor) -> bytes:
        """Count the step; the load of all ranks, from rank 0, if the plan asks for it."""
        self._recorder.add(routes, decode_S)
        if not plan.collect_load:
            return b""
        load_L2E = self._group.all_reduce(self._recorder.take())
        return load_L2E.cpu().numpy().tobytes() if self._group.rank == 0 else b""

    @torch.inference_mode()
    def stage(self, command: StageExperts) -> None:
        """Begin to fetch what the new placement of some layers needs."""
        shares_LEC = self._table(command, layers_of(command.rows))
        self._shares = dict(zip(sorted(command.rows), shares_LEC, strict=True))
        self._migrator.begin(Stage(command.epoch, command.rows))

    @torch.inference_mode()
    def set_shares(self, command: SetShares) -> None:
        """Other shares for the placement that is served; those of another placement come too late or too early."""
        if command.epoch != self._epoch:
            return
        shares_LEC = self._table(command, self._migrator.rows)
        for layer, shares_EC in enumerate(shares_LEC):
            self._map(layer, self._migrator.rows[layer], shares_EC)

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
        )

    def _commit(self, epoch: int) -> None:
        rows: Mapping[int, Sequence[int]] = self._migrator.commit(epoch)
        for layer, row in rows.items():
            self._map(layer, row, self._shares[layer])
        self._epoch, self._shares = epoch, {}

    def _map(self, layer: int, row: Sequence[int], shares_EC: Tensor) -> None:
        slots_EC = slots_of_copies(row, self._placed.num_logical, shares_EC.shape[1])
        self._layers[layer].expert_map.update(slots_EC.to(self._group.device), shares_EC)

    def _table(self, command: StageExperts | SetShares, rows_LP: Sequence[Sequence[int]]) -> Tensor:
        """This rank's cumulative shares (layers, E, C) float32."""
        table = table_of_rank(command, rows_LP, self._placed, self._group.rank)
        return torch.from_numpy(table).to(self._group.device)
