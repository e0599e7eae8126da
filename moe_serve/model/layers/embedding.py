"""Token embedding and output head, their rows cut over the tensor-parallel ranks by vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from moe_kernels.linear.linear import linear
from moe_kernels.linear.packing import pack, unpack_rows
from torch import Tensor, nn
from torch.nn import functional

from moe_serve.base.progress import Phase, Progress
from moe_serve.model.kernels import path_for
from moe_serve.model.layers.linear import weight
from moe_serve.parallel.collectives import Group


class VocabEmbedding(nn.Module):
    """Looks up the tokens of its own range; the sum over the group has them all.

    `is_packed`: its weight is the head's too, and lies as that wants it.
    """

    def __init__(self, vocab: range, hidden: int, group: Group, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.vocab = vocab
        self.group = group
        self.is_packed = False
        self.weight = weight(len(vocab), hidden, dtype=dtype, device=device)

    def forward(self, token_ids_T: Tensor, progress: Progress) -> Tensor:
        if self.group.size == 1:
            return self._rows(token_ids_T)
        inside = (token_ids_T >= self.vocab.start) & (token_ids_T < self.vocab.stop)
        x_TD = self._rows((token_ids_T - self.vocab.start) * inside)
        progress.enter(Phase.TENSOR_PARALLEL)
        return self.group.all_reduce(x_TD * inside[:, None])

    def _rows(self, indices_T: Tensor) -> Tensor:
        if self.is_packed:
            return unpack_rows(self.weight, indices_T)
        return functional.embedding(indices_T, self.weight)


class VocabHead(nn.Module):
    """Logits of its own range of the vocabulary, gathered from all ranks. May share the embedding's weight."""

    def __init__(
        self, rows: nn.Parameter, vocab_sizes: Sequence[int], group: Group, *, path: str | None = None
    ) -> None:
        super().__init__()
        self.path = path_for(path, *rows.shape)
        self.weight = rows
        self.vocab_sizes = tuple(vocab_sizes)
        self.group = group

    def finish_loading(self, embedding: VocabEmbedding | None) -> None:
        """Once, when the weight was filled; `embedding` of the same rank, which may share it."""
        if self.path is None:
            return
        pack(self.weight)
        if embedding is not None and embedding.weight is self.weight:
            embedding.is_packed = True

    def forward(self, hidden_SD: Tensor, progress: Progress) -> Tensor:
        """(S, V) float32 on every rank."""
        if self.path is not None:
            logits = linear(self.path, hidden_SD, self.weight, wide=True)
        else:
            logits = functional.linear(hidden_SD, self.weight)
        if self.group.size > 1:
            progress.enter(Phase.TENSOR_PARALLEL)
            columns = self.group.all_gather_ragged(logits.t().contiguous(), self.vocab_sizes)
            logits = columns.t()
        return logits.float()
