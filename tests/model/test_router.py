"""A router does what its settings say, whatever the architecture they come from."""

from __future__ import annotations

import torch

from moe_serve.base.model_config import RouterConfig
from moe_serve.model.moe.router import Router

T, D, E = 5, 8, 6


def routed(settings: RouterConfig) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    router = Router(D, E, settings, device=torch.device("cpu"))
    with torch.inference_mode():
        router.weight.copy_(torch.randn((E, D), generator=generator))
        return router(torch.randn((T, D), generator=generator))


def test_scale_multiplies_the_weights_after_they_were_made_to_add_up_to_one() -> None:
    ids, weights = routed(RouterConfig(top_k=2, norm_topk_prob=True))
    same_ids, scaled = routed(RouterConfig(top_k=2, norm_topk_prob=True, scale=2.5))
    assert torch.equal(ids, same_ids)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(T))
    torch.testing.assert_close(scaled, 2.5 * weights)


def test_weights_that_are_not_renormalised_are_probabilities_over_all_experts() -> None:
    _, all_of_them = routed(RouterConfig(top_k=E))
    _, two = routed(RouterConfig(top_k=2))
    torch.testing.assert_close(all_of_them.sum(dim=1), torch.ones(T))
    assert torch.equal(two, all_of_them[:, :2])
