"""The experts a rank holds, and their computation on the rows that arrived.

Shape letters: e local physical experts, R received rows, C capacity per expert, D hidden, F expert width (this rank's
part of it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from moe_kernels.experts.experts import experts
from moe_kernels.linear.packing import pack, pack_gated
from moe_kernels.moe.moe import moe, moe_terms
from moe_kernels.quantise.quantise import dequantise
from torch import Tensor, nn
from torch.nn import functional

from moe_serve.model.all2all.base import Arrived, Batched, Placed, RankMajor, Sorted
from moe_serve.model.all2all.rows import add_to_rows, put_rows, sort_rows
from moe_serve.model.kernels import path_for
from moe_serve.model.layers.linear import weight

GROUPED_MM_ALIGNMENT = 16
"""Bytes; torch's grouped_mm takes no row strides between, and on CUDA it is documented for bfloat16 only."""
MAX_PADDING, MAX_PADDED_ROWS = 8, 2048
"""Where padding to one batched product can beat one product per expert, in bfloat16 on a CPU."""
CALL_BYTES = 640 << 10
"""What a product per expert costs beside reading its weights, as bytes that a batched product reads in that time."""
FEW_ROWS = 16
"""Up to so many an expert, bfloat16 products on a CPU are faster with the weights on the left: none is repacked."""


class ExpertSlots(Protocol):
    """One layer's experts on a rank as memory: a slot is a list of tensors, of any number, shapes and types.

    Whoever fills, copies or moves experts knows no more of them. All slots of all ranks are alike.
    """

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, all its parts together; also known where a rank has no slot."""

    def parts(self, slot: int) -> list[Tensor]:
        """Views of a slot's memory, always in the same order: what is written there is what is computed with."""

    def targets(self, slot: int) -> dict[str, Tensor]:
        """Parameter name of the weight rules -> where the loader puts it. Only until finish_loading()."""

    def finish_loading(self) -> None:
        """Once, when all slots are filled: for whoever keeps weights in another form than he was given them."""


class Experts(nn.Module):
    """`gate_up` (e, 2F, D), gate above up; `down` (e, D, F). down(silu(gate(x)) * up(x)) by one grouped GEMM pair.

    On a compiled path each slot's weights lie packed from finish_loading() on, and move as the bytes they then are.
    """

    def __init__(
        self,
        num_local: int,
        hidden: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        path: str | None = None,
    ) -> None:
        super().__init__()
        self.path = path_for(path, width, hidden)
        self.gate_up = weight(num_local, 2 * width, hidden, dtype=dtype, device=device)
        self.down = weight(num_local, hidden, width, dtype=dtype, device=device)

    @property
    def slot_bytes(self) -> int:
        weights = (self.gate_up, self.down)
        return sum(each.shape[1:].numel() * each.element_size() for each in weights)

    def parts(self, slot: int) -> list[Tensor]:
        return [self.gate_up[slot], self.down[slot]]

    def targets(self, slot: int) -> dict[str, Tensor]:
        gate, up = self.gate_up[slot].chunk(2)
        return {"gate": gate, "up": up, "down": self.down[slot]}

    def finish_loading(self) -> None:
        if self.path is not None:
            for gate_up, down in zip(self.gate_up, self.down, strict=True):
                pack_gated(gate_up)
                pack(down)

    def forward(self, arrived: Arrived) -> Tensor:
        """Each row's expert's output, in the order and shape of `arrived.rows`; weighted where weights came along."""
        if arrived.scales is not None:
            rows = dequantise(arrived.rows, arrived.scales, self.down.dtype)
            arrived = replace(arrived, rows=rows, scales=None)
        match arrived:
            case Sorted(rows, counts_e, _, weights):
                out = self._sorted(rows, counts_e)
            case Batched(rows, _, _, weights):
                out = self._batched(rows)
            case RankMajor(rows, ids_RK, weights_RK) if self.path is not None:
                return moe(self.path, rows, ids_RK, weights_RK, self.gate_up, self.down)
            case RankMajor(rows, ids_RK, weights_RK):
                wanted, pairs, counts_e = sort_rows(rows, ids_RK, 0, self.gate_up.shape[0])
                terms = self._sorted(wanted, counts_e)
                return add_to_rows(terms, pairs, weights_RK, rows.dtype)
            case Placed(rows, slots_AK, first_slot, terms_AKD):
                return self._placed(rows, slots_AK, first_slot, terms_AKD)
        return out if weights is None else (out.float() * weights.unsqueeze(-1)).to(out.dtype)

    def _placed(self, rows: Tensor, slots_AK: Tensor, first_slot: int, terms_AKD: Tensor) -> Tensor:
        if self.path is not None:
            return moe_terms(self.path, rows, slots_AK, self.gate_up, self.down, terms_AKD, first_slot=first_slot)
        wanted, pairs, counts_e = sort_rows(rows, slots_AK, first_slot, self.gate_up.shape[0])
        put_rows(terms_AKD.flatten(0, 1), pairs, self._sorted(wanted, counts_e))
        return terms_AKD

    def _sorted(self, rows: Tensor, counts_e: Tensor) -> Tensor:
        if not rows.shape[0]:
            return rows
        if self.path is not None:
            return experts(self.path, rows.contiguous(), counts_e.contiguous(), self.gate_up, self.down)
        if rows.device.type == "cpu" and rows.dtype == torch.bfloat16:
            counts = counts_e.tolist()
            if padding_pays(counts, self.slot_bytes):
                return self._padded(rows, counts_e, max(counts))
            if rows.shape[0] <= FEW_ROWS * sum(count > 0 for count in counts):
                return self._one_by_one(rows, counts)
        gate, up = grouped_linear(rows, self.gate_up, counts_e).chunk(2, dim=-1)
        return grouped_linear(functional.silu(gate) * up, self.down, counts_e)

    def _batched(self, rows: Tensor) -> Tensor:
        """(e, C, D), places without a row included: leaving them out would need to know how many there are."""
        if self.path is not None:
            counts_e = torch.full((rows.shape[0],), rows.shape[1])
            return self._sorted(rows.flatten(0, 1), counts_e).view(rows.shape)
        gate, up = torch.bmm(rows, self.gate_up.transpose(1, 2)).chunk(2, dim=-1)
        return torch.bmm(functional.silu(gate) * up, self.down.transpose(1, 2))

    def _padded(self, rows: Tensor, counts_e: Tensor, capacity: int) -> Tensor:
        """The same with as many rows for every expert, the missing ones zero."""
        num_local, num_rows = len(counts_e), rows.shape[0]
        expert_R = torch.repeat_interleave(torch.arange(num_local), counts_e, output_size=num_rows)
        before_R = (counts_e.cumsum(0) - counts_e)[expert_R]
        place_R = torch.arange(num_rows) - before_R + expert_R * capacity
        padded = rows.new_zeros((num_local * capacity, rows.shape[1])).index_copy_(0, place_R, rows)
        padded = padded.view(num_local, capacity, -1)
        if capacity <= FEW_ROWS:
            gate, up = torch.bmm(self.gate_up, padded.transpose(1, 2)).chunk(2, dim=1)
            out = torch.bmm(self.down, functional.silu(gate) * up).transpose(1, 2)
        else:
            out = self._batched(padded)
        return out.reshape(num_local * capacity, -1).index_select(0, place_R)

    def _one_by_one(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The same, expert after expert; those without rows are not looked at."""
        out, first = torch.empty_like(rows), 0
        for expert, count in enumerate(counts):
            if count:
                part, first = slice(first, first + count), first + count
                out[part] = _one_expert(rows[part], self.gate_up[expert], self.down[expert])
        return out


def _one_expert(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Some rows' outputs (n, D). One row is a vector, which is faster again than a matrix of one column."""
    if rows.shape[0] > FEW_ROWS:
        gate, up = (rows @ gate_up.t()).chunk(2, dim=1)
        return (functional.silu(gate) * up) @ down.t()
    columns = rows[0] if rows.shape[0] == 1 else rows.t()
    gate, up = (gate_up @ columns).chunk(2)
    return (down @ (functional.silu(gate) * up)).t()


def padding_pays(counts: Sequence[int], expert_bytes: int) -> bool:
    """Is one batched product, which reads all experts, faster than products of those alone that have rows?

    In bfloat16, on a CPU, where reading weights is what a product of few rows takes its time for. `counts` (e,).
    """
    num_padded, busy = len(counts) * max(counts), sum(count > 0 for count in counts)
    if num_padded > min(MAX_PADDED_ROWS, MAX_PADDING * sum(counts)):
        return False
    return len(counts) * expert_bytes <= busy * (expert_bytes + CALL_BYTES)


def grouped_linear(rows: Tensor, weights: Tensor, counts_e: Tensor) -> Tensor:
    """The next counts_e[i] rows times weights[i].T: (R, in), (e, out, in) -> (R, out)."""
    if rows.device.type == "cpu" and rows.dtype == torch.bfloat16:
        return _in_few_sizes(rows, weights, counts_e.tolist())
    if _known_to_torch(weights) and not _mostly_empty(counts_e):
        return functional.grouped_mm(rows, weights.transpose(1, 2), offs=counts_e.cumsum(0).to(torch.int32))
    out = rows.new_empty((rows.shape[0], weights.shape[1]))
    first = 0
    for expert, count in enumerate(counts_e.tolist()):
        if count:
            part, first = slice(first, first + count), first + count
            torch.mm(rows[part], weights[expert].t(), out=out[part])
    return out


def _in_few_sizes(rows: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    """The same, with rows of other experts beside an expert's own until there are as many as some products have.

    oneDNN compiles a kernel for each number of rows that it meets and keeps the last 1,024: a gigabyte, and time.
    """
    out, first = rows.new_empty((rows.shape[0], weights.shape[1])), 0
    for expert, count in enumerate(counts):
        if count:
            part, size = slice(first, first + count), rounded_rows(count)
            start = min(first, rows.shape[0] - size)
            if start < 0:  # fewer rows than that in all
                beside, start = functional.pad(rows[part], (0, 0, 0, size - count)), first
            else:
                beside = rows[start : start + size]
            out[part] = (beside @ weights[expert].t())[first - start : first - start + count]
            first += count
    return out


def rounded_rows(count: int) -> int:
    """At least so many: a multiple of 8 and, from 128 on, of a sixteenth of the next power of two."""
    step = max(8, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-count // step) * step


def _known_to_torch(weights: Tensor) -> bool:
    known = weights.device.type == "cpu" or weights.dtype == torch.bfloat16
    return known and all(width * weights.dtype.itemsize % GROUPED_MM_ALIGNMENT == 0 for width in weights.shape[1:])


def _mostly_empty(counts_e: Tensor) -> bool:
    """On a CPU grouped_mm makes the same products as a loop, with the same bits, and also those of no rows."""
    return counts_e.device.type == "cpu" and 2 * int(counts_e.count_nonzero()) <= len(counts_e)
