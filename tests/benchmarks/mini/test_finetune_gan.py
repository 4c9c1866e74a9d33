"""The second phase of mini's autoencoder on tiny networks."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from benchmarks.mini.training.__main__ import base, copy_autoencoder
from benchmarks.mini.training.dataset import Crops
from benchmarks.mini.training.ema import update_ema
from benchmarks.mini.training.finetune_gan import (
    GanOptions,
    GanTraining,
    MultiscaleDiscriminator,
    corrupt_latents,
    d_loss,
    evaluate,
    feature_matching,
    g_loss,
    texture_loss,
    train_vae_gan,
)
from benchmarks.mini.training.mini_base import MiniConfig, build_mini
from benchmarks.mini.training.train_autoencoder import load_teacher
from lsast_engines.errors import TrainingError
from lsast_train.base.base import autocast
from lsast_train.base.mini_networks import MiniAutoencoder

TINY = GanOptions(
    steps=60,
    batch=2,
    lr=4e-3,
    encoder_lr=4e-3,
    discriminator_lr=4e-3,
    lr_warmup=5,
    gan_warmup=2,
    ema=0.9,
    evaluate_every=1,
    checkpoint_minutes=0.0,
)


def tiny(seed: int = 0) -> MiniAutoencoder:
    torch.manual_seed(seed)
    return MiniAutoencoder((8, 8, 12), (16, 8, 8), (1, 1, 1), (1, 1, 1))


def squared(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Stands in for the features of EfficientNet."""
    return (image - target).square().mean()


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def crops(picture_folders: list[Path]) -> Crops:
    return Crops(picture_folders, 64)


def test_corrupt_latents_differ_in_smoothing_and_noise_by_row():
    latents = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    assert torch.equal(corrupt_latents(latents, replace(TINY, smoothing=0.0, noise=0.0), draw), latents)
    kernel = torch.full((4, 1, 3, 3), 1 / 9)
    mean = F.conv2d(F.pad(latents, (1, 1, 1, 1), mode="reflect"), kernel, groups=4)
    smooth = corrupt_latents(latents, replace(TINY, smoothing=1.0, noise=0.0), draw)
    parts = ((smooth - latents) / (mean - latents)).flatten(1)
    torch.testing.assert_close(parts, parts[:, :1].expand_as(parts), atol=2e-2, rtol=0)  # one part a row
    assert parts[:, 0].min() < 0.1
    assert parts[:, 0].max() > 0.9
    noisy = corrupt_latents(latents, replace(TINY, smoothing=0.0, noise=1.0), draw) - latents
    spreads = noisy.flatten(1).std(1)
    assert spreads.min() < 0.2
    assert 0.8 < spreads.max() < 1.2
    assert noisy.mean().abs() < 0.05


class Recorded:
    """A perceptual distance that notes what it was asked."""

    def __call__(self, image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.image, self.target = image.detach(), target
        return squared(image, target)


def test_generator_losses_equal_their_formulas():
    autoencoder = tiny()
    state = GanTraining(autoencoder, replace(TINY, smoothing=0.0, noise=0.0), torch.device("cpu"))
    for parameter in state.anchor.parameters():
        parameter.zero_()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad(), autocast(torch.device("cpu"), "auto"):
        latents = autoencoder.encode(images).float()
        decoded = autoencoder.decode(latents).float()
    asked = Recorded()
    parts = state.train_step(0, images, asked)
    torch.testing.assert_close(asked.image, decoded)
    assert torch.equal(asked.target, images)
    a, b = decoded.numpy(), images.numpy()

    def energy(x: np.ndarray, axis: int) -> np.ndarray:
        step = np.moveaxis(np.abs(np.diff(x, axis=axis)), axis, 2)  # [2, 3, 31, 32]: the last window has 7 rows
        windows = [step[:, :, k : k + 8].mean(2).reshape(2, 3, 4, 8).mean(3) for k in range(0, 31, 8)]
        return np.log(np.stack(windows) + 0.01)

    expected = {
        "quarter": np.abs((a - b).reshape(2, 3, 8, 4, 8, 4).mean((3, 5))).mean(),
        "full": np.abs(a - b).mean(),
        "texture": np.mean([np.abs(energy(a, axis) - energy(b, axis)).mean() for axis in (2, 3)]),
        "anchor": (latents.numpy() ** 2).mean() + np.abs(latents.numpy()).mean(),
        "perceptual": ((a - b) ** 2).mean(),
    }
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value, rel=1e-3), name
    assert parts.keys() == {*expected, "discriminator"}  # before the warm-up ends


def test_with_a_teacher_the_first_rows_are_the_teachers(teacher_folder):
    teacher = load_teacher(teacher_folder)
    state = GanTraining(tiny(), replace(TINY, gan_warmup=0), torch.device("cpu"), teacher)
    images, latents = torch.rand(4, 3, 64, 64) * 2 - 1, torch.randn(4, 4, 8, 8, requires_grad=True)
    with torch.no_grad():
        taught = teacher.encoder(images)
        expected = teacher.decoder(taught[:3]).clamp(-1, 1)
    given, target = state.batch(latents, taught, images)
    assert torch.equal(given, torch.cat([taught[:3], latents[3:]]))
    torch.testing.assert_close(target, torch.cat([expected, images[3:]]))
    assert not given.requires_grad
    before = [weights(x) for x in (teacher, state.autoencoder.encoder, state.autoencoder.decoder)]
    state.train_step(0, images, squared)
    after = [weights(x) for x in (teacher, state.autoencoder.encoder, state.autoencoder.decoder)]
    assert [equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, False]
    assert "anchor" not in state.modules


def test_texture_loss_does_not_ask_where_the_texture_lies():
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).tile(16, 16).expand(1, 3, 32, 32)
    assert texture_loss(-checks, checks) == 0
    assert texture_loss(checks / 2, checks).item() == pytest.approx(math.log(2.01 / 1.01), rel=1e-5)
    assert texture_loss(torch.zeros_like(checks), checks).item() == pytest.approx(math.log(2.01 / 0.01), rel=1e-5)


def test_ema_follows_its_formula():
    ema, live = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    value = 0.0
    torch.nn.init.constant_(ema.weight, value)
    for step in range(1, 200):
        torch.nn.init.constant_(live.weight, step)
        update_ema(ema, live, 0.95, step)
        decay = min(0.95, (1 + step) / (10 + step))
        value = decay * value + (1 - decay) * step
    assert ema.weight.item() == pytest.approx(value, rel=1e-4)


def test_each_network_learns_in_its_time():
    options = replace(TINY, gan_warmup=1, encoder_part=2 / TINY.steps)
    state = GanTraining(tiny(), options, torch.device("cpu"))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    networks = {
        "encoder": state.autoencoder.encoder,
        "decoder": state.autoencoder.decoder,
        "discriminator": state.discriminator,
    }
    learned, parts = [], []
    for step in range(3):
        before = {name: weights(network) for name, network in networks.items()}
        parts.append(state.train_step(step, images, squared))
        learned.append({name for name, network in networks.items() if not equal(before[name], weights(network))})
    assert learned == [set(networks), set(networks), {"decoder", "discriminator"}]
    assert [("adversarial" in part, "matching" in part) for part in parts] == [
        (False, False),
        (True, True),
        (True, True),
    ]
    assert [bool(part["anchor"] > 0) for part in parts] == [False, True, False]  # nothing has moved, moved, at rest


def test_resume_from_a_checkpoint_gives_the_same_weights(crops, tmp_path):
    whole, cut = tiny(), tiny()
    options = replace(TINY, steps=6)
    train_vae_gan(whole, crops, options, tmp_path / "whole", squared)

    def broken(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if image.requires_grad and (tmp_path / "cut/finetune_gan.log.json").exists():
            history = json.loads((tmp_path / "cut/finetune_gan.log.json").read_text())["history"]
            if history[-1]["step"] == 4:
                raise KeyboardInterrupt
        return squared(image, target)

    with pytest.raises(KeyboardInterrupt):
        train_vae_gan(cut, crops, options, tmp_path / "cut", broken)
    again = tiny()
    train_vae_gan(again, crops, options, tmp_path / "cut", squared, resume=True)
    assert equal(weights(whole), weights(again))
    assert not equal(weights(whole), weights(tiny()))


@pytest.mark.slow
def test_training_brings_texture_back(crops, tmp_path):
    autoencoder = tiny()
    pictures = crops.pictures(2)
    before = evaluate(autoencoder, autoencoder.encoder, pictures, squared)
    assert before["latent_shift"] == 0
    first = copy.deepcopy(autoencoder.encoder)
    train_vae_gan(autoencoder, crops, replace(TINY, evaluate_every=TINY.steps), tmp_path, squared)
    after = evaluate(autoencoder, first, pictures, squared)
    assert after["psnr"] > before["psnr"] - 1
    assert after["texture_distance"] < before["texture_distance"]
    assert after["latent_shift"] > 0
    history = json.loads((tmp_path / "finetune_gan.log.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [TINY.steps]
    assert history[-1]["psnr"] == pytest.approx(after["psnr"], abs=1e-3)


def test_a_base_gives_its_autoencoder(picture_folders):
    source, target = (build_mini(MiniConfig.tiny(), seed) for seed in (1, 2))
    unet = weights(target.unet)
    copy_autoencoder(source, target)
    assert equal(weights(source.autoencoder), weights(target.autoencoder))
    assert equal(unet, weights(target.unet))
    with pytest.raises(TrainingError, match="another autoencoder"):
        copy_autoencoder(build_mini(MiniConfig()), target)


def test_the_command_line_wants_a_start():
    result = CliRunner().invoke(base, ["--images", "i", "--out", "o"])
    assert result.exit_code == 2
    assert "neither --teacher nor --init" in result.output


@pytest.mark.parametrize(("scale", "pixels"), [(0, 26), (1, 52)])
def test_a_score_sees_its_patch_only(scale, pixels):
    torch.manual_seed(0)
    discriminator = MultiscaleDiscriminator((4, 4, 4))
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    discriminator(image)[scale][-1][0, 0, 8, 8].backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min() + 1) == pixels


def test_hinge_losses_equal_their_formulas():
    real = [[torch.tensor([2.0, 0.5])], [torch.tensor([-1.0, 1.0])]]
    fake = [[torch.tensor([-2.0, 0.5])], [torch.tensor([-1.0, 3.0])]]
    # Scale 0: (0 + 0.5)/2 + (0 + 1.5)/2 = 1; scale 1: (2 + 0)/2 + (0 + 4)/2 = 3.
    assert d_loss(real, fake).item() == pytest.approx(2)
    assert g_loss(fake).item() == pytest.approx((0.75 - 1) / 2)


def test_feature_matching_is_relative_and_leaves_the_scores_out():
    real = [[torch.full((2,), 2.0), torch.full((2,), 4.0), torch.zeros(1)]] * 2
    fake = [[torch.full((2,), 3.0), torch.full((2,), 3.0), torch.ones(1)]] * 2
    assert feature_matching(real, fake).item() == pytest.approx(1 / 2 + 1 / 4)
