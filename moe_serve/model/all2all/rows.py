"""What backends share: rows sorted by expert, rows packed for the wire, terms added up at home.

Shape letters: T rows, A rows of all ranks, K top-k, R (row, expert) pairs, e local physical experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from moe_kernels.combine.combine import combine
from moe_kernels.sorting import reference, sorting
from torch import Tensor

from moe_serve.model.all2all.base import Sorted
from moe_serve.model.all2all.shape import ExpertLayout


@dataclass(frozen=True, slots=True)
class GatheredTicket:
    """Of backends that bring everybody's rows to everybody: which (row, expert) pairs are computed here, and whose."""

    pairs: Tensor
    weights_AK: Tensor
    rows_by_rank: tuple[int, ...]
    dtype: torch.dtype


def sort_gathered(
    arrived: Sequence[Tensor], rows_by_rank: Sequence[int], layout: ExpertLayout, rank: int, path: str | None = None
) -> Sorted:
    """Everybody's x (A, D), slots (A, K) and weights (A, K): those of this rank's experts, and the ticket home."""
    x_AD, slots_AK, weights_AK = arrived
    rows, pairs, counts_e = sort_rows(x_AD, slots_AK, layout.first_slot(rank), layout.num_local(rank), path)
    return Sorted(rows, counts_e, GatheredTicket(pairs, weights_AK, tuple(rows_by_rank), x_AD.dtype))


def sort_rows(
    x_TD: Tensor, slots_TK: Tensor, first_slot: int, num_local: int, path: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows whose slots lie in [first_slot, first_slot + num_local), by expert, then in order of the batch.

    Gives them (R, D), their `pairs` (R,) int64, each t * K + k, and `counts_e` (e,) int64.
    """
    if path is not None:
        return sorting.sort_rows(path, x_TD, slots_TK, first_slot, num_local)
    return reference.sort_rows(x_TD, slots_TK, first_slot, num_local)


def pack(parts: Sequence[Tensor]) -> Tensor:
    """Matrices of T rows each as one of bytes, so that they travel in one message: (T, bytes) uint8."""
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)


def unpack(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts again, of as many rows as arrived, with the widths and types of those in `like`."""
    pieces = torch.split(packed, [part.shape[1] * part.dtype.itemsize for part in like], dim=1)
    return [piece.contiguous().view(part.dtype) for piece, part in zip(pieces, like, strict=True)]


def add_to_rows(
    outputs: Tensor, pairs: Tensor, weights_TK: Tensor, dtype: torch.dtype, path: str | None = None
) -> Tensor:
    """Outputs (R, D) of some pairs, weighted and added to their rows in float32: (T, D) of `dtype`.

    In the order of the pairs; on a compiled `path` in that of the top k.
    """
    if path is not None and outputs.dtype == dtype == torch.bfloat16:
        return combine(path, outputs.contiguous(), pairs, weights_TK.contiguous())
    total_TD = outputs.new_zeros((weights_TK.shape[0], outputs.shape[1]), dtype=torch.float32)
    weights = weights_TK.reshape(-1, 1).index_select(0, pairs)
    # A product of mixed types has the same bits and takes several times as long on a CPU.
    weighted = outputs * weights if outputs.dtype == torch.float32 else outputs.float().mul_(weights)
    return total_TD.index_add_(0, pairs // weights_TK.shape[1], weighted).to(dtype)


def put_rows(places: Tensor, indices: Tensor, rows: Tensor) -> None:
    """places[indices[r]] = rows[r], both (..., D). torch moves element by element: in elements of 16 bytes a row takes
    a quarter of the time of bfloat16's."""
    row_bytes = rows.shape[1] * rows.element_size()
    if row_bytes % 16 == 0 and rows.storage_offset() * rows.element_size() % 16 == 0:
        places, rows = places.view(torch.complex128), rows.view(torch.complex128)
    places.index_copy_(0, indices, rows)


def add_in_order(terms_TKD: Tensor, weights_TK: Tensor, dtype: torch.dtype, path: str | None = None) -> Tensor:
    """The K terms of each row, weighted and added first to last in float32: (T, D) of `dtype`."""
    if path is not None and terms_TKD.dtype == dtype == torch.bfloat16:
        terms = terms_TKD.reshape(-1, terms_TKD.shape[-1])
        return combine(path, terms, None, weights_TK.contiguous())
    total_TD = terms_TKD[:, 0].float() * weights_TK[:, :1]
    for k in range(1, weights_TK.shape[1]):
        total_TD.addcmul_(terms_TKD[:, k].float(), weights_TK[:, k : k + 1])
    return total_TD.to(dtype)


def add_parts(parts: Tensor, count: int) -> Tensor:
    """`count` ranks' parts of the same terms, one behind the other on dimension 0, added first to last in float32."""
    stacked = parts.view(count, -1, *parts.shape[1:]).float()
    total = stacked[0]
    for part in stacked[1:]:
        total = total + part
    return total.to(parts.dtype)


def fill_gaps(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Missing ids (-1) become experts that their row does not have yet, of weight 0: for wires that know no gaps.

    Row t takes them from the K experts behind t * K, so that no expert gets them all; among K there are always enough.
    Nothing here depends on a value on the host.
    """
    num_rows, top_k = ids_TK.shape
    missing_TK = ids_TK < 0
    steps = torch.arange(num_rows * top_k, device=ids_TK.device, dtype=ids_TK.dtype)
    near_TK = steps.view(num_rows, top_k) % num_experts
    taken_TK = (near_TK[:, :, None] == ids_TK[:, None, :]).any(dim=-1)
    free_first_TK = near_TK.gather(1, taken_TK.to(torch.uint8).argsort(dim=1, stable=True))
    which_TK = (missing_TK.cumsum(dim=1) - 1).clamp(min=0)
    return (
        torch.where(missing_TK, free_first_TK.gather(1, which_TK), ids_TK),
        weights_TK.masked_fill(missing_TK, 0.0),
    )


def one_row_at_least(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """These, or if there are none a row that no expert weighs: for wires on which each rank must send."""
    if x_TD.shape[0]:
        return x_TD, ids_TK, weights_TK
    ids = torch.arange(ids_TK.shape[1], dtype=ids_TK.dtype, device=ids_TK.device)[None]
    return x_TD.new_zeros((1, x_TD.shape[1])), ids, weights_TK.new_zeros((1, ids_TK.shape[1]))
