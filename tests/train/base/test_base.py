"""What the inversion feeds to the frozen networks, against diffusers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

from lsast_train.base.base import Base
from schedulers import ddpm


def _stock(network: Any) -> Any:
    stock = copy.deepcopy(network)
    stock.set_attn_processor(AttnProcessor())
    return stock


def _inputs(base: Base) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, *base.null_context.shape, generator=generator)
    edges = (torch.rand(2, 1, 64, 64, generator=generator) < 0.2).float().expand(-1, 3, -1, -1)
    return latent, torch.tensor([30, 870]), context, edges


@pytest.mark.parametrize("controlled", [False, True])
def test_eps_with_equal_contexts_equals_stock_diffusers(base: Base, controlled: bool) -> None:
    latent, times, context, edges = _inputs(base)
    residuals = {}
    if controlled:
        down, mid = _stock(base.controlnet)(latent, times, context, edges, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    velocity = _stock(base.unet)(latent, times, context, **residuals, return_dict=False)[0]
    schedule = ddpm()
    alphas = schedule.alphas_cumprod[times].view(-1, 1, 1, 1)
    # v = alpha eps - sigma x0 and x = alpha x0 + sigma eps, solved for eps
    expected = alphas.sqrt() * velocity + (1 - alphas).sqrt() * latent
    found = base.eps(latent, times, context[:, None].expand(-1, 3, -1, -1), edges if controlled else None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(base.add_noise(latent, noise, times), schedule.add_noise(latent, noise, times))
