"""The held-out loss, and the released way of training against what the released algorithm computed."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from golden_sets import both_sets
from lsast_train.base.base import Base, BaseConfig
from lsast_train.base.mini_networks import MiniAutoencoder
from lsast_train.checkpoints.single_file import controlnet_weights, unet_weights
from lsast_train.evaluation import ValidationSet, noise_error
from lsast_train.inversion import Inversion
from lsast_train.options import PRESETS
from lsast_train.paintings import PaintingDataset
from lsast_train.prompts.prompt_space import PromptSpace
from schedulers import ddpm


def _stub_base(eps: Callable[..., torch.Tensor]) -> Any:
    config = SimpleNamespace(noise=SimpleNamespace(train_steps=1000))
    return SimpleNamespace(eps=eps, add_noise=ddpm().add_noise, config=config)


def test_validation_loss_of_zeros_is_one_in_the_stages_asked_for():
    latents = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    blind = ValidationSet(_stub_base(lambda noisy, *_: torch.zeros_like(noisy)), latents, 0, "no")
    space = PromptSpace(torch.randn(4, 8))
    found = blind.losses(space, [2, 7])
    assert found.nonzero().flatten().tolist() == [2, 7]
    assert found[[2, 7]].numpy() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(blind.losses(space, []), torch.zeros(10, dtype=torch.float64))


@pytest.mark.parametrize("shift", [0, 0.01])
def test_validation_loss_of_a_stage_is_the_mean_of_its_rows(shift):
    """A base that knows the latents and is off by `shift` times its timestep everywhere."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def off(noisy: torch.Tensor, time: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        abar = ddpm().alphas_cumprod[time].view(-1, 1, 1, 1)
        return (noisy - abar.sqrt() * latents) / (1 - abar).sqrt() + shift * time.view(-1, 1, 1, 1)

    probe = ValidationSet(_stub_base(off), latents.expand(3, -1, -1, -1), 0, "no")
    found = probe.losses(PromptSpace(torch.randn(4, 8)), range(10))
    # Three latents, so the middles of the thirds of each stage: 16, 50, 83, then 116, 150 …
    times = [[100 * stage + middle for middle in (16, 50, 83)] for stage in range(10)]
    expected = [sum((shift * time) ** 2 for time in rows) / 3 for rows in times]
    assert found.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_validation_noise_is_the_same_every_time_and_another_for_every_row():
    seen: list[torch.Tensor] = []

    def eps(noisy: torch.Tensor, time: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        seen.append(noisy / (1 - ddpm().alphas_cumprod[time]).sqrt().view(-1, 1, 1, 1))
        return torch.zeros_like(noisy)

    probe = ValidationSet(_stub_base(eps), torch.zeros(2, 4, 8, 8), 0, "no")
    space = PromptSpace(torch.randn(4, 8))
    first = probe.losses(space, range(10))
    torch.testing.assert_close(probe.losses(space, reversed(range(10))), first)
    noise = torch.cat(seen)[:20]
    assert torch.cdist(noise.flatten(1), noise.flatten(1)).add(100 * torch.eye(20)).min() > 10


def test_noise_error_in_bf16_computes_contexts_in_fp32(text_base, collection, brief, tmp_path, monkeypatch):
    run = Inversion(text_base, collection, replace(brief, mixed_precision="bf16"), "red", tmp_path)
    seen: list[Any] = []

    def eps(noisy: torch.Tensor, time: torch.Tensor, contexts: Any) -> torch.Tensor:
        seen.append(contexts)
        assert torch.is_autocast_enabled("cpu")
        return noisy

    expected = run.space.contexts(torch.tensor([340]))
    monkeypatch.setattr(text_base, "eps", eps)
    latents = torch.zeros(1, 4, 8, 8)
    noise_error(text_base, run.space, latents, latents, torch.tensor([340]), "bf16")
    assert torch.equal(torch.stack(list(seen[0]), dim=1), expected)


def _space(contexts: torch.Tensor) -> PromptSpace:
    """The released layout and gradient over given contexts [12, T, dim]."""
    space = PromptSpace(contexts[0], generator="direct", layout="overlap", gradient="decoder")
    space.matrices.data = contexts.clone()
    return space


def test_gradient_decoder_keeps_nothing_before_the_decoder(base):
    space = _space(torch.randn(12, 4, 24))
    seen: dict[str, bool] = {}
    for name in ("conv_in", "mid_block", "up_blocks.0", "conv_out"):
        module = base.unet.get_submodule(name)
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.requires_grad}))
    noise_error(base, space, torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16), torch.tensor([5]), "no")
    assert seen == {"conv_in": False, "mid_block": False, "up_blocks.0": False, "conv_out": True}


@both_sets
def test_noise_error_of_a_released_training_step_is_the_recorded_one(golden):
    tokens, dim = golden.tensors("io")["unconditional"].shape
    base = Base(
        BaseConfig("golden", "sd15", "epsilon", tokens, 128, 0.18215),
        "0" * 64,
        unet_weights(golden.tensors("unet"), golden.heads).build(),
        controlnet_weights(golden.tensors("control"), golden.heads).build(),
        MiniAutoencoder((4, 4, 4), (4, 4, 4)),
        torch.zeros(tokens, dim),
    )
    for given in golden.training_cases():
        space = _space(given["contexts"][:12])
        loss = noise_error(base, space, given["z"], given["noise"], given["t"], "no").mean()
        torch.autograd.backward(loss)
        assert loss.item() == pytest.approx(given["loss"].item(), rel=1e-5)
        gradient = space.matrices.grad
        assert gradient.flatten(1).abs().sum(1).nonzero().flatten().tolist() == given["grad_index"].tolist()
        assert (gradient[given["grad_index"]][0] - given["grad"]).abs().max() < 1e-4 * given["grad"].abs().max()


def test_released_preset_trains_only_the_last_rows_of_decoder_prompts(text_base, paintings, tmp_path):
    """Its first step: AdamW moves what has a gradient by the learning rate and lets the rest decay (docs/method.md
    §3)."""
    options = replace(PRESETS["released"], steps=1, size=64, evaluate_every=1, evaluate_latents=2)
    collection = PaintingDataset.load(paintings, 64, options.crop, progress=False)
    run = Inversion(text_base, collection, options, "red", tmp_path)
    before = run.space.geglu.ff.net[2].bias.detach().clone().view(30, 24)
    run.run()
    moved = (run.space.geglu.ff.net[2].bias.view(30, 24) - before * (1 - 1e-6 * 0.01)).abs()
    (index,) = (moved.mean(1) > 5e-7).nonzero().flatten().tolist()
    assert 2 <= index <= 11
    assert moved[index].median().item() == pytest.approx(1e-6, rel=0.1)
    assert moved[[k for k in range(30) if k != index]].max() < 5e-8  # float32's rounding
