"""Token embedding and output head, their rows cut over the tensor-parallel ranks by vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_serve.base.progress import Phase, Progress
from moe_serve.model.layers.linear import weight
from moe_serve.parallel.collectives import Group


class VocabEmbedding(nn.Module):
    """Looks up the tokens of its own range; the sum over the group has them all."""

    def __init__(self, vocab: range, hidden: int, group: Group, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.vocab = vocab
        self.group = group
        self.weight = weight(len(vocab), hidden, dtype=dtype, device=device)

    def forward(self, token_ids_T: Tensor, progress: Progress) -> Tensor:
        if self.group.size == 1:
            return functional.embedding(token_ids_T, self.weight)
        inside = (token_ids_T >= self.vocab.start) & (token_ids_T < self.vocab.stop)
        x_TD = functional.embedding((token_ids_T - self.vocab.start) * inside, self.weight)
        progress.enter(Phase.TENSOR_PARALLEL)
        return self.group.all_reduce(x_TD * inside[:, None])


class VocabHead(nn.Module):
    """Logits of its own range of the vocabulary, gathered from all ranks. May share the embedding's weight."""

    def __init__(self, rows: nn.Parameter, vocab_sizes: Sequence[int], group: Group) -> None:
        super().__init__()
        self.weight = rows
        self.vocab_sizes = tuple(vocab_sizes)
        self.group = group

    def forward(self, hidden_SD: Tensor, progress: Progress) -> Tensor:
        """(S, V) float32 on every rank."""
        logits = functional.linear(hidden_SD, self.weight)
        if self.group.size > 1:
            progress.enter(Phase.TENSOR_PARALLEL)
            columns = self.group.all_gather_ragged(logits.t().contiguous(), self.vocab_sizes)
            logits = columns.t()
        return logits.float()
