"""scores() in torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def scores(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """As scores.scores()."""
    return functional.linear(x_TD.float(), weight_ED)
