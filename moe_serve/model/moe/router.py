"""The router: which experts a row goes to, and with what weights.

Shape letters: T rows, D hidden, E logical experts, K top-k.
"""

from __future__ import annotations

import torch
from moe_kernels.route.route import route
from torch import Tensor, nn
from torch.nn import functional

from moe_serve.base.model_config import RouterConfig
from moe_serve.model.layers.linear import weight


class Router(nn.Module):
    """The K experts that score highest, and their weights; how is in `settings`.

    Scores are computed in float32 whatever the model's type: in bfloat16 close experts would swap places.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        settings: RouterConfig,
        *,
        device: torch.device,
        path: str | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.weight = weight(num_experts, hidden, dtype=torch.float32, device=device)
        self.settings = settings

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Logical expert ids (T, K) int64, heaviest first, and their weights (T, K) float32."""
        settings = self.settings
        assert settings.score == "softmax"
        assert settings.num_groups == 1
        if self.path is not None:
            renormalise, scale = settings.norm_topk_prob, settings.scale
            return route(self.path, x_TD, self.weight, settings.top_k, renormalise=renormalise, scale=scale)
        scores_TE = functional.linear(x_TD.float(), self.weight).softmax(dim=-1)
        weights_TK, ids_TK = scores_TE.topk(settings.top_k, dim=-1)
        if settings.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        if settings.scale != 1.0:
            weights_TK = weights_TK * settings.scale
        return ids_TK, weights_TK
