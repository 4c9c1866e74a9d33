"""Training of a tiny base and autoencoder on pictures whose two labels differ in colour."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks.mini.training.__main__ import main
from benchmarks.mini.training.dataset import Crops, LatentDataset, build_cache
from benchmarks.mini.training.mini_base import MiniConfig, build_mini
from benchmarks.mini.training.train_autoencoder import AutoencoderOptions, evaluate, load_teacher, train_autoencoder
from benchmarks.mini.training.train_unet import BaseTrainingOptions, JointModel, learning_rate_factor, train_base
from lsast_engines.errors import TrainingError
from lsast_train.base.attention import layer_contexts
from lsast_train.base.lazy_base import load_base, save_base
from lsast_train.base.mini_networks import MiniAutoencoder
from schedulers import ddpm

TINY = BaseTrainingOptions(steps=6, batch=6, side=16, warmup=2, evaluate_every=100)


@pytest.fixture(scope="module")
def data(picture_folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    path = tmp_path_factory.mktemp("cache") / "latents.safetensors"
    torch.manual_seed(0)
    build_cache(picture_folders, torch.nn.Conv2d(3, 4, 8, stride=8).requires_grad_(False), path)
    return LatentDataset(path)


def test_v_error_is_relative_to_diffusers_velocity(data):
    base = build_mini(MiniConfig.tiny())
    learner = JointModel(base, 2)
    scheduler = ddpm()
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 16, 16, generator=generator) for _ in range(2))
    t = torch.tensor([3, 400, 990])
    context = learner.null_context.expand(3, -1, -1)
    noisy = scheduler.add_noise(latents, noise, t)
    kwargs = layer_contexts(context[:, None].expand(-1, 3, -1, -1))
    with torch.no_grad():
        output = base.unet(noisy, t, None, cross_attention_kwargs=kwargs).sample
        expected = (output - scheduler.get_velocity(latents, noise, t)).square().mean((1, 2, 3))
        found = learner.v_error(latents, noise, t, context, torch.zeros(0, 3, 128, 128))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        # The base's noise from v, against the inverse of diffusers' velocity.
        velocity = scheduler.get_velocity(latents, noise, t)
        torch.testing.assert_close(base.eps_from_output(velocity, noisy, t), noise, atol=1e-5, rtol=1e-5)


def test_v_error_of_rows_without_edges_has_no_controlnet(data):
    learner = JointModel(build_mini(MiniConfig.tiny()), 2)
    window = data.window(data.train[:4], 16, np.random.default_rng(0))
    noise, t = torch.randn_like(window.latents), torch.tensor([10, 300, 600, 900])
    context = learner.null_context.expand(4, -1, -1)
    with torch.no_grad():
        none = learner.v_error(window.latents, noise, t, context, window.edges[:0])
        half = learner.v_error(window.latents, noise, t, context, window.edges[:2])
    torch.testing.assert_close(half[2:], none[2:])
    assert (half[:2] - none[:2]).abs().min() > 1e-6


def test_learning_rate_factor_warms_up_holds_and_decays():
    options = BaseTrainingOptions(steps=1000, warmup=10)
    assert [learning_rate_factor(s, options) for s in (0, 9, 500, 799, 900, 1000)] == [0.1, 1, 1, 1, 0.5, 0]
    assert [learning_rate_factor(500, options, left) for left in (0.5, 0.2, 0.1, 0.0)] == [1, 1, 0.5, 0]


@pytest.mark.slow
def test_train_base_lowers_the_loss_and_tokens_reach_it(data, tmp_path):
    base = build_mini(MiniConfig.tiny())
    options = replace(TINY, steps=60, batch=12, lr=4e-3, style_lr=4e-3, evaluate_every=30)
    train_base(base, data, options, tmp_path, resume=False)
    history = json.loads((tmp_path / "base.log.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [30, 60]
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    gain = history[-1]["gain"]
    assert [row["t"] for row in gain] == [150, 350, 550, 750, 950]
    # So few steps of so small networks teach no more than that tokens reach the prediction.
    assert min(abs(row["own"] - row["other"]) for row in gain) > 1e-7


@pytest.mark.gpu
def test_train_base_on_cuda_is_near_that_on_the_cpu(picture_folders, data, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    encoder = torch.nn.Conv2d(3, 4, 8, stride=8).requires_grad_(False)
    build_cache(picture_folders, encoder, tmp_path / "latents.safetensors", "cuda")
    there = LatentDataset(tmp_path / "latents.safetensors", "cuda")
    windows = [x.window(data.train[:4], 16, np.random.default_rng(0)) for x in (data, there)]
    assert torch.equal(windows[0].edges, windows[1].edges.cpu())
    losses = []
    for name, device in (("cpu", "cpu"), ("cuda", "cuda"), ("again", "cuda")):
        base = build_mini(MiniConfig.tiny())
        (tmp_path / name).mkdir()
        train_base(base, LatentDataset(tmp_path / "latents.safetensors", device), TINY, tmp_path / name, resume=False)
        assert base.device.type == "cpu"
        losses.append(json.loads((tmp_path / name / "base.log.json").read_text())["history"][0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)


def test_train_autoencoder_nears_its_teacher(picture_folders, teacher_folder, tmp_path):
    torch.manual_seed(0)
    student = MiniAutoencoder((8, 8, 12), (16, 8, 8), (1, 1, 1), (1, 1, 1))
    teacher, crops = load_teacher(teacher_folder), Crops(picture_folders, 64)
    before = evaluate(student, teacher, crops)
    options = AutoencoderOptions(steps=40, batch=4, side=64, lr=4e-3, warmup=5)
    train_autoencoder(student, teacher, crops, options, tmp_path, resume=False)
    after = evaluate(student, teacher, crops)
    assert after["latent_rmse"] < before["latent_rmse"]
    assert after["decoder_psnr_to_teacher"] > before["decoder_psnr_to_teacher"] + 3


def test_base_command_with_invalid_teacher_or_share_fails(picture_folders, tmp_path):
    root = str(picture_folders[0].parent)
    result = CliRunner().invoke(
        main, ["base", "--images", root, "--teacher", str(tmp_path), "--out", str(tmp_path / "o")]
    )
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    bad = CliRunner().invoke(main, ["base", "--images", root, "--teacher", "t", "--out", "o", "--share", "red"])
    assert bad.exit_code == 2
    assert "LABEL=NUMBER" in bad.output


def test_base_command_within_seconds_leaves_a_whole_base(tmp_path, monkeypatch):
    """The phases but the GAN's: each of them ends by the limit, far from its number of steps."""
    monkeypatch.setattr("benchmarks.mini.training.__main__.MiniConfig", MiniConfig.tiny)
    monkeypatch.setattr(
        "benchmarks.mini.training.__main__.LiteDistance", lambda device: lambda a, b: (a - b).square().mean()
    )
    given = build_mini(MiniConfig.tiny(), seed=4)
    save_base(given, tmp_path / "given")
    (tmp_path / "pictures").mkdir()
    for index in range(60):
        Image.new("RGB", (100, 100), (index, 0, 0)).save(tmp_path / "pictures" / f"{index}.png")
    arguments = ["--init", str(tmp_path / "given"), "--gan-steps", "0", "--side", "8", "--batch", "2"]
    arguments += ["--images", str(tmp_path / "pictures"), "--device", "cpu", "--seconds", "1", "--lr", "1e-3"]
    result = CliRunner().invoke(main, ["base", *arguments, "--out", str(tmp_path / "base")], catch_exceptions=False)
    assert result.exit_code == 0
    base = load_base(str(tmp_path / "base"))
    encoders = (base.autoencoder.encoder, given.autoencoder.encoder)
    assert all(torch.equal(*pair) for pair in zip(*(encoder.parameters() for encoder in encoders), strict=True))
    last = json.loads((tmp_path / "base" / "base.log.json").read_text())["history"][-1]
    assert 1 <= last["step"] < BaseTrainingOptions().steps
    assert (tmp_path / "base" / "base.checkpoint.safetensors").exists()
    assert (
        "found --device nowhere"
        in CliRunner().invoke(main, ["base", *arguments, "--device", "nowhere", "--out", "o"]).output
    )


def test_base_command_resumes_with_the_autoencoder_of_its_latents_or_refuses(
    picture_folders, teacher_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("benchmarks.mini.training.__main__.MiniConfig", MiniConfig.tiny)
    monkeypatch.setattr(
        "benchmarks.mini.training.__main__.LiteDistance", lambda device: lambda a, b: (a - b).square().mean()
    )
    arguments = ["--images", str(picture_folders[0].parent), "--teacher", str(teacher_folder), "--device", "cpu"]
    arguments += ["--autoencoder-steps", "1", "--gan-steps", "1", "--steps", "1"]
    arguments += ["--side", "8", "--batch", "2", "--out", str(tmp_path)]
    trained = []
    for resume in ([], ["--resume"]):
        CliRunner().invoke(main, ["base", *arguments, *resume], catch_exceptions=False)
        trained.append(load_base(tmp_path).fingerprint)
    assert trained[0] == trained[1]
    refused = CliRunner().invoke(main, ["base", *arguments])  # a later --resume would go on with phases of both runs
    assert refused.exit_code == 1
    assert "found checkpoints of another run" in refused.output
    assert "base.checkpoint.safetensors" in refused.output
    for phase in ("finetune_gan", "autoencoder"):
        (tmp_path / f"{phase}.checkpoint.safetensors").unlink()
        refused = CliRunner().invoke(main, ["base", *arguments, "--resume"])
        assert refused.exit_code == 1
        assert f"latents.safetensors without {phase}.checkpoint" in refused.output


def test_crops_of_too_few_or_too_small_pictures_are_refused(tmp_path):
    Image.new("RGB", (300, 300)).save(tmp_path / "a.png")
    with pytest.raises(TrainingError, match=r"found 1 pictures, .* of them held out by a hash of the name"):
        Crops([tmp_path], 64)
    for index in range(100):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{index}.png")
    (tmp_path / "a.png").unlink()
    crops = Crops([tmp_path], 64)
    with pytest.raises(TrainingError, match="found no readable picture of at least"):
        crops.batch(crops.train, 1, np.random.default_rng(0))
