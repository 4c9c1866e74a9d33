"""The adversarial phase on tiny networks."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from lsast_train.base.mini_autoencoder import MiniAutoencoder
from lsast_train.mini.finetune_gan import (
    PatchDiscriminator,
    SharpeningOptions,
    _losses,
    cut_crops,
    evaluate_sharpness,
    sharpen_autoencoder,
    spoil,
)
from lsast_train.mini.train_autoencoder import Crops

TINY = SharpeningOptions(steps=80, batch=4, crops=32, lr=6e-3, warmup=10, adversarial=0.002, matching=0.01)


def student() -> MiniAutoencoder:
    torch.manual_seed(0)
    return MiniAutoencoder((8, 8, 12), (16, 8, 8), (1, 1, 1), (1, 1, 1))


def test_latents_are_spoilt_row_by_row() -> None:
    latents = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    clean = spoil(latents, replace(TINY, smoothing=0.0, jitter=0.0), draw)
    assert torch.equal(clean, latents)
    kernel = torch.full((4, 1, 3, 3), 1 / 9)
    mean = F.conv2d(F.pad(latents, (1, 1, 1, 1), mode="reflect"), kernel, groups=4)
    smooth = spoil(latents, replace(TINY, smoothing=1.0, jitter=0.0), draw)
    parts = ((smooth - latents) / (mean - latents)).flatten(1)
    torch.testing.assert_close(parts, parts[:, :1].expand_as(parts), atol=2e-2, rtol=0)  # one part a row
    assert parts[:, 0].min() < 0.1
    assert parts[:, 0].max() > 0.9
    noisy = spoil(latents, replace(TINY, smoothing=0.0, jitter=1.0), draw) - latents
    spreads = noisy.flatten(1).std(1)
    assert spreads.min() < 0.2
    assert 0.8 < spreads.max() < 1.2


def test_a_verdict_sees_26_pixels() -> None:
    critic = PatchDiscriminator((4, 4, 4))
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    critic(image)[-1][0, 0, 8, 8].backward()
    assert image.grad is not None
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min() + 1) == 26


def test_each_side_learns_from_its_own_loss_only() -> None:
    autoencoder, critic = student(), PatchDiscriminator((4, 4, 4))
    first, draw = copy.deepcopy(autoencoder.encoder).requires_grad_(False), torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    losses = _losses(autoencoder, first, critic, images, TINY, draw, listening=False)
    assert losses["anchor"] == 0  # not a step from the first phase yet
    losses["critic"].backward(retain_graph=True)
    assert all(p.grad is None for p in autoencoder.parameters())
    critic.zero_grad()
    # Before the warm-up ends the student does not hear the critic at all.
    losses["student"].backward()
    assert all(p.grad is None or not p.grad.any() for p in critic.parameters())
    assert all(p.grad is not None and p.grad.any() for p in autoencoder.parameters())


def test_the_anchor_holds_the_latents() -> None:
    autoencoder, critic = student(), PatchDiscriminator((4, 4, 4))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    first = torch.nn.Sequential(autoencoder.encoder, torch.nn.Hardtanh(9, 10)).requires_grad_(False)  # always 9
    parts = [
        _losses(autoencoder, first, critic, images, replace(TINY, anchor=weight), torch.Generator().manual_seed(0),
                listening=False)
        for weight in (0.0, 1.0)
    ]  # fmt: skip
    away = (autoencoder.encode(images) - 9).square().mean()
    torch.testing.assert_close(parts[1]["student"] - parts[0]["student"], away, rtol=0.02, atol=0)


def test_it_goes_on_from_a_checkpoint_and_learns(picture_folders: list[Path], tmp_path: Path) -> None:
    crops = Crops(picture_folders, 64)
    held_out = cut_crops(crops, crops.held_out, 16, 5)
    autoencoder = student()
    first = copy.deepcopy(autoencoder.encoder)
    before = evaluate_sharpness(autoencoder, first, held_out)
    assert before["latent_shift"] == 0
    sharpen_autoencoder(autoencoder, crops, TINY, tmp_path, resume=False)
    after = evaluate_sharpness(autoencoder, first, held_out)
    assert after["psnr"] > before["psnr"] + 2
    assert after["latent_shift"] > 0
    decoder = [value.clone() for value in autoencoder.decoder.parameters()]
    encoder = {name: value.clone() for name, value in autoencoder.encoder.state_dict().items()}
    longer = replace(TINY, steps=TINY.steps + 3, encoder_steps=TINY.steps)
    sharpen_autoencoder(autoencoder, crops, longer, tmp_path, resume=True)
    assert all(torch.equal(value, encoder[name]) for name, value in autoencoder.encoder.state_dict().items())
    assert not all(torch.equal(a, b) for a, b in zip(autoencoder.decoder.parameters(), decoder, strict=True))
    again = student()
    sharpen_autoencoder(again, crops, longer, tmp_path, resume=True)  # no step is left
    for a, b in zip(autoencoder.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    stored = load_file(tmp_path / "sharpening.checkpoint.safetensors")
    assert any(key.startswith("critic.") for key in stored)
    assert json.loads((tmp_path / "sharpening.log.json").read_text())["history"][-1]["step"] == longer.steps


def test_gradient_energy_of_the_picture_itself_is_one() -> None:
    class Exact(MiniAutoencoder):
        def decode(self, latent: torch.Tensor) -> torch.Tensor:
            return pixels.float() / 127.5 - 1

    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(0)
    exact = Exact((8, 8, 12), (16, 8, 8), (1, 1, 1), (1, 1, 1))
    found = evaluate_sharpness(exact, exact.encoder, pixels)
    assert found["gradient_energy"] == pytest.approx(1)
