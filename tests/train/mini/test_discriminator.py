"""The discriminator and its losses."""

from __future__ import annotations

import pytest
import torch

from lsast_train.mini.finetune_gan import MultiscaleDiscriminator, d_loss, feature_matching, g_loss


@pytest.mark.parametrize(("scale", "pixels"), [(0, 26), (1, 52)])
def test_a_score_sees_its_patch_only(scale: int, pixels: int) -> None:
    torch.manual_seed(0)
    discriminator = MultiscaleDiscriminator((4, 4, 4))
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    discriminator(image)[scale][-1][0, 0, 8, 8].backward()
    assert image.grad is not None
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min() + 1) == pixels


def test_hinge_losses_equal_their_formulas() -> None:
    real = [[torch.tensor([2.0, 0.5])], [torch.tensor([-1.0, 1.0])]]
    fake = [[torch.tensor([-2.0, 0.5])], [torch.tensor([-1.0, 3.0])]]
    # Scale 0: (0 + 0.5)/2 + (0 + 1.5)/2 = 1; scale 1: (2 + 0)/2 + (0 + 4)/2 = 3.
    assert d_loss(real, fake).item() == pytest.approx(2)
    assert g_loss(fake).item() == pytest.approx((0.75 - 1) / 2)


def test_feature_matching_is_relative_and_leaves_the_scores_out() -> None:
    real = [[torch.full((2,), 2.0), torch.full((2,), 4.0), torch.zeros(1)]] * 2
    fake = [[torch.full((2,), 3.0), torch.full((2,), 3.0), torch.ones(1)]] * 2
    assert feature_matching(real, fake).item() == pytest.approx(1 / 2 + 1 / 4)
