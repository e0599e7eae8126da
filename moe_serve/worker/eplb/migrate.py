"""Moves expert weights between ranks while serving goes on: staged into shadow rows, committed everywhere in one step.

All ranks derive the same transfers from the old and the new placement, cut into pieces of bounded size. A piece is
one all-to-all over a group of its own, posted between two steps and looked at between later ones: ranks hear of a
stage at different steps, and one that waited for another inside a step would stop both.

Shape letters: P physical slots, L layers, D hidden, F expert width.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_serve.model.moe.experts import ExpertSlots
from moe_serve.parallel.collectives import Group
from moe_serve.parallel.pending import Pending

CHECKSUM_BYTES = 8


@dataclass(frozen=True, slots=True)
class Flow:
    """One expert's weights on their way. Slots are physical ones."""

    layer: int
    expert: int
    source: int
    source_slot: int
    target: int
    target_slot: int


@dataclass(frozen=True, slots=True)
class Stage:
    """What to make ready: `rows` layer -> its new physical_to_logical (P,), every other layer stays as it is."""

    epoch: int
    rows: Mapping[int, Sequence[int]]


@dataclass(slots=True)
class Status:
    """How a stage stands on this rank. `failed` says why it cannot be finished; `pieces_posted` of the stage so far."""

    epoch: int = 0
    staged: bool = False
    failed: str = ""
    pieces_posted: int = 0
    bytes_received: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _UnderWay:
    stage: Stage
    pieces: list[list[Flow]]
    status: Status
    started: float
    copies: list[Flow]
    shadow: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    transfer: Pending[Tensor] | None = None
    last_piece: int | None = None
    """Dropped: only pieces before this one are still exchanged, because some rank has posted them."""


class Migrator:
    """One rank's part in rearrangements. Used between steps only, by the thread that runs them.

    `experts` and `rows` (the present placement) by layer; `offsets` slot ranges of the group's ranks.
    """

    def __init__(
        self,
        experts: Mapping[int, ExpertSlots],
        group: Group,
        offsets: Sequence[int],
        rows: Mapping[int, Sequence[int]],
        *,
        max_bytes_per_step: int,
    ) -> None:
        self._experts = experts
        self._group = group
        self._offsets = tuple(offsets)
        self._rows = {layer: list(row) for layer, row in rows.items()}
        self._max_bytes = max_bytes_per_step
        self._work: _UnderWay | None = None

    @property
    def status(self) -> Status | None:
        """Of the stage under way; None when there is none."""
        return None if self._work is None else self._work.status

    @property
    def rows(self) -> dict[int, list[int]]:
        """physical_to_logical (P,) of each layer as it is served now."""
        return self._rows

    def begin(self, stage: Stage) -> None:
        """Take up a stage; nothing is sent before the first poll()."""
        assert self._work is None, f"stage {stage.epoch} while another is under way"
        remote: list[Flow] = []
        copies: list[Flow] = []
        for layer, row in sorted(stage.rows.items()):
            for flow in flows_of(layer, self._rows[layer], row, self._offsets):
                (remote if flow.source != flow.target else copies).append(flow)
        pieces = cut_into_pieces(remote, self._row_bytes(), self._max_bytes)
        mine = [flow for flow in copies if flow.target == self._group.rank]
        self._work = _UnderWay(stage, pieces, Status(stage.epoch), time.monotonic(), mine)

    def poll(self) -> None:
        """Go on as far as that needs no waiting: at most one piece is posted and one taken in."""
        work = self._work
        if work is None or work.status.staged:
            return
        if work.transfer is not None:
            if not work.transfer.is_done():
                return
            self._take_in(work, work.transfer.wait())
            work.transfer = None
        wanted = len(work.pieces) if work.last_piece is None else work.last_piece
        if work.status.pieces_posted < wanted:
            self._post(work)
        elif work.last_piece is not None:
            self._work = None
        elif not work.status.failed:
            self._stage_copies(work)
            work.status.staged = True
            work.status.seconds = time.monotonic() - work.started

    def commit(self, epoch: int) -> Mapping[int, Sequence[int]]:
        """Put the shadow rows in place; the layers' new rows. All ranks do this before the same step."""
        work = self._work
        assert work is not None, f"commit of epoch {epoch} without a stage"
        assert work.status.staged, f"commit of epoch {epoch} before it is staged"
        assert work.stage.epoch == epoch, f"commit of epoch {epoch} while {work.stage.epoch} is staged"
        first = self._offsets[self._group.rank]
        for (layer, slot), shadow in work.shadow.items():
            _copy(self._experts[layer].parts(slot - first), shadow)
        for layer, row in work.stage.rows.items():
            self._rows[layer] = list(row)
        self._work = None
        return work.stage.rows

    def drop(self, pieces_posted: int) -> None:
        """Give a stage up; `pieces_posted` the most that any rank has posted. poll() ends those, then all is as before.

        Every rank is told the same number in the same step.
        """
        work = self._work
        if work is None:
            return
        work.status.staged = False
        work.shadow.clear()
        work.last_piece = pieces_posted
        self.poll()

    # -- one piece --

    def _post(self, work: _UnderWay) -> None:
        """Send this rank's rows of the next piece and make room for those that come."""
        piece = work.pieces[work.status.pieces_posted]
        work.status.pieces_posted += 1
        rank, size = self._group.rank, self._group.size
        leaving = sorted((flow for flow in piece if flow.source == rank), key=lambda flow: flow.target)
        send_counts = [sum(flow.target == other for flow in leaving) for other in range(size)]
        recv_counts = [sum(flow.source == other and flow.target == rank for flow in piece) for other in range(size)]
        work.transfer = self._group.start_all_to_all_ragged(self._pack(leaving), send_counts, recv_counts)

    def _take_in(self, work: _UnderWay, arrived: Tensor) -> None:
        """Check and keep the rows of the piece posted last."""
        piece = work.pieces[work.status.pieces_posted - 1]
        coming = sorted((flow for flow in piece if flow.target == self._group.rank), key=lambda flow: flow.source)
        work.status.bytes_received += arrived.numel()
        if work.last_piece is not None:
            return
        wrong = (checksums(arrived, coming) != arrived.view(torch.int64)[:, -1]).nonzero().flatten().tolist()
        if wrong:
            flow = coming[wrong[0]]
            work.status.failed = (
                f"expert {flow.expert} of MoE layer {flow.layer} came from expert-parallel rank {flow.source} "
                "with another checksum than it left with"
            )
            return
        first = self._offsets[self._group.rank]
        for flow, row in zip(coming, arrived, strict=True):
            like = self._experts[flow.layer].parts(flow.target_slot - first)
            work.shadow[flow.layer, flow.target_slot] = parts_in(row, like)

    def _stage_copies(self, work: _UnderWay) -> None:
        """Experts that this rank holds already, in another slot than they will have."""
        first = self._offsets[self._group.rank]
        for flow in work.copies:
            held = self._experts[flow.layer].parts(flow.source_slot - first)
            work.shadow[flow.layer, flow.target_slot] = [part.clone() for part in held]

    def _pack(self, flows: Sequence[Flow]) -> Tensor:
        """The weights of the flows' source slots as bytes, one row each, a checksum behind: (flows, bytes) uint8."""
        first = self._offsets[self._group.rank]
        packed = torch.zeros(
            (len(flows), self._row_bytes() + CHECKSUM_BYTES), dtype=torch.uint8, device=self._group.device
        )
        for row, flow in zip(packed, flows, strict=True):
            held = self._experts[flow.layer].parts(flow.source_slot - first)
            _copy(parts_in(row, held), held)
        packed.view(torch.int64)[:, -1] = checksums(packed, flows)
        return packed

    def _row_bytes(self) -> int:
        """Bytes of one expert in the layer that has the largest, and what is missing to whole words."""
        size = max((experts.slot_bytes for experts in self._experts.values()), default=CHECKSUM_BYTES)
        return -(-size // CHECKSUM_BYTES) * CHECKSUM_BYTES


def parts_in(row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A row's bytes (uint8, from an address that suits every type) seen as tensors like these, in their order.

    They lie in the row by size of element, the largest first: so each is aligned and none needs room in front of it.
    """
    found = list(like)
    first = 0
    for place in sorted(range(len(like)), key=lambda each: -like[each].element_size()):
        part = like[place]
        found[place] = row[first : first + part.nbytes].view(part.dtype).view(part.shape)
        first += part.nbytes
    return found


def _copy(into: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    for target, part in zip(into, parts, strict=True):
        target.copy_(part)


def flows_of(layer: int, old: Sequence[int], new: Sequence[int], offsets: Sequence[int]) -> list[Flow]:
    """What every slot that changes needs, in the order of target slots; a rank that holds an expert copies its own.

    Several holders take turns in sending. `old` and `new` are physical_to_logical (P,).
    """
    owners = [rank for rank in range(len(offsets) - 1) for _ in range(offsets[rank], offsets[rank + 1])]
    holders: dict[int, list[int]] = defaultdict(list)
    for slot, expert in enumerate(old):
        holders[expert].append(slot)
    turns: dict[int, int] = defaultdict(int)
    flows = []
    for slot, (before, expert) in enumerate(zip(old, new, strict=True)):
        if before == expert:
            continue
        target = owners[slot]
        own = [held for held in holders[expert] if owners[held] == target]
        if own:
            source_slot = own[0]
        else:
            source_slot = holders[expert][turns[expert] % len(holders[expert])]
            turns[expert] += 1
        flows.append(Flow(layer, expert, owners[source_slot], source_slot, target, slot))
    return flows


def cut_into_pieces(flows: Sequence[Flow], row_bytes: int, max_bytes: int) -> list[list[Flow]]:
    """As few pieces as come of filling one after the other, in the order of the flows.

    In none does a rank send or receive more than `max_bytes` (or one row, if that is more).
    """
    most = max(1, max_bytes // row_bytes)
    pieces: list[list[Flow]] = []
    left = list(flows)
    while left:
        sent: dict[int, int] = defaultdict(int)
        received: dict[int, int] = defaultdict(int)
        piece: list[Flow] = []
        later: list[Flow] = []
        for flow in left:
            if max(sent[flow.source], received[flow.target]) < most:
                piece.append(flow)
                sent[flow.source] += 1
                received[flow.target] += 1
            else:
                later.append(flow)
        pieces.append(piece)
        left = later
    return pieces


def checksums(packed: Tensor, flows: Sequence[Flow]) -> Tensor:
    """int64, one per row of packed bytes (its own checksum, the last eight, left out).

    It changes when bytes change, when the halves of a row swap places, and with the layer and the expert.
    """
    words = packed.view(torch.int64)[:, :-1]
    names = torch.tensor(
        [flow.layer * 0x9E3779B1 + flow.expert * 0x85EBCA77 for flow in flows], dtype=torch.int64, device=packed.device
    )
    half = words[:, words.shape[1] // 2 :].sum(dim=1)
    return words.sum(dim=1) + 3 * half + names
