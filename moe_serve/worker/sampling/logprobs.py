"""Log-probabilities of the unmodified logits: of one token per row, its rank and the best alternatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_serve.base.commands import TokenLogprob
from moe_serve.base.sampling import MAX_LOGPROBS


def token_logprobs(logits_SV: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """For row i of `logits_SV` (float32): token_ids[i] and the num_top[i] most likely. Tokens that tie share a rank."""
    logprobs_SV = torch.log_softmax(logits_SV, dim=-1)
    own_S1 = logprobs_SV.gather(1, torch.tensor(token_ids, device=logits_SV.device).unsqueeze(1))
    ranks = ((logprobs_SV > own_S1).sum(dim=-1) + 1).tolist()
    own = own_S1.squeeze(1).tolist()
    tops: list[list[tuple[int, float]]] = [[] for _ in token_ids]
    if any(num_top):
        # Always the same number, so that the order of ties does not depend on what others ask for.
        best = logprobs_SV.topk(min(MAX_LOGPROBS, logits_SV.shape[1]), dim=-1)
        for row, (ids, values) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
            tops[row] = list(zip(ids[: num_top[row]], values[: num_top[row]], strict=True))
    return [TokenLogprob(token, own[row], ranks[row], tops[row]) for row, token in enumerate(token_ids)]
