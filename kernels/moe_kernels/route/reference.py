"""route() in torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def route(
    x_TD: Tensor, weight_ED: Tensor, top_k: int, *, renormalise: bool = False, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As route.route(). Sorted, not topk(), which leaves open which of equal scores it takes."""
    scores_TE = functional.linear(x_TD.float(), weight_ED)
    ids_TK = scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_TK = scores_TE.softmax(dim=-1).gather(1, ids_TK)
    if renormalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return ids_TK, weights_TK * scale
