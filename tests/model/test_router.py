"""A router does what its settings say, whatever the architecture they come from."""

from __future__ import annotations

import pytest
import torch
from moe_kernels.paths import available

from moe_serve.base.model_config import RouterConfig
from moe_serve.model.moe.router import Router

T, D, E = 5, 8, 6


PATHS = [None, *available()]


def routed(settings: RouterConfig, path: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    router = Router(D, E, settings, device=torch.device("cpu"), path=path)
    with torch.inference_mode():
        router.weight.copy_(torch.randn((E, D), generator=generator))
        return router(torch.randn((T, D), generator=generator).to(torch.bfloat16))


@pytest.mark.parametrize("path", PATHS)
def test_scale_multiplies_the_weights_after_they_were_made_to_add_up_to_one(path: str | None) -> None:
    ids, weights = routed(RouterConfig(top_k=2, norm_topk_prob=True), path)
    same_ids, scaled = routed(RouterConfig(top_k=2, norm_topk_prob=True, scale=2.5), path)
    assert torch.equal(ids, same_ids)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(T))
    torch.testing.assert_close(scaled, 2.5 * weights)


@pytest.mark.parametrize("path", PATHS)
def test_weights_that_are_not_renormalised_are_probabilities_over_all_experts(path: str | None) -> None:
    _, all_of_them = routed(RouterConfig(top_k=E), path)
    _, two = routed(RouterConfig(top_k=2), path)
    torch.testing.assert_close(all_of_them.sum(dim=1), torch.ones(T))
    assert torch.equal(two, all_of_them[:, :2])


@pytest.mark.parametrize("path", available())
@pytest.mark.parametrize("settings", [RouterConfig(top_k=3), RouterConfig(top_k=2, norm_topk_prob=True, scale=0.5)])
def test_a_compiled_path_takes_the_same_experts_as_torch(path: str, settings: RouterConfig) -> None:
    ids, weights = routed(settings, path)
    expected_ids, expected = routed(settings)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
