"""What the doubles have in common: tensors of all ranks, rows by expert, terms that come home."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

AllGather = Callable[[Any], list[Any]]
SENT_TYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int64, torch.int32, torch.uint32, torch.float16)


def exchange(allgather: AllGather, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Everybody's tensors, in order of rank; `allgather` takes lists of numbers, lists and bytes."""
    told = []
    for each in tensors:
        kind = SENT_TYPES.index(each.dtype)
        told.append([kind, list(each.shape), each.contiguous().view(torch.uint8).numpy().tobytes()])
    return [[_tensor(*one) for one in theirs] for theirs in allgather(told)]


def _tensor(kind: int, shape: list[int], data: bytes | bytearray) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=SENT_TYPES[kind])
    return torch.frombuffer(bytearray(data), dtype=SENT_TYPES[kind]).view(shape)


def rows_at(rows: Tensor, which: Tensor) -> Tensor:
    """rows[which], of any type: torch does not index 8-bit floats."""
    return rows.view(torch.uint8)[which].view(rows.dtype)


def rows_for_expert(came: Sequence[Sequence[Tensor]], expert: int) -> tuple[list[Tensor], Tensor]:
    """Of everybody's (ids (T, K), rows, ...) what wants an expert, in order of rank: the rows and what lies beside
    them, and (rank, row) of each."""
    parts, sources = [], []
    for rank, (ids, *beside) in enumerate(came):
        tokens = (ids.long() == expert).any(dim=1).nonzero()[:, 0]
        parts.append([rows_at(each, tokens) for each in beside])
        sources.append(torch.stack([torch.full_like(tokens, rank), tokens], dim=1))
    return [torch.cat(each) for each in zip(*parts, strict=True)], torch.cat(sources)


def weighted_in_order(
    came: Sequence[Sequence[Tensor]], rank: int, ids_TK: Tensor, weights_TK: Tensor, hidden: int
) -> Tensor:
    """Of everybody's (outputs (R, D), (R, 3) expert, rank, row) this rank's rows: terms added in order of K."""
    terms = torch.zeros((*ids_TK.shape, hidden))
    arrived = torch.zeros(ids_TK.shape, dtype=torch.bool)
    for outputs, whose in came:
        for output, (expert, source, token) in zip(outputs, whose.tolist(), strict=True):
            if source == rank:
                places = ids_TK[token].long() == expert
                terms[token, places] = output.float()
                arrived[token, places] = True
    assert bool(arrived.all()), "a row waits for as many terms as it has experts"
    total = torch.zeros((ids_TK.shape[0], hidden))
    for k in range(ids_TK.shape[1]):
        total += terms[:, k] * weights_TK[:, k : k + 1]
    return total
