"""The released way of training, against what the released algorithm computed (docs/method.md §3: encoder and middle
without gradient, so that only the decoder's context learns)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from golden_sets import GoldenFiles, both_sets
from lsast_train.base.base import Base, BaseConfig, build_base
from lsast_train.base.mini_autoencoder import MiniAutoencoder
from lsast_train.checkpoints.single_file import controlnet_weights, unet_weights
from lsast_train.evaluation import noise_error
from lsast_train.inversion import Inversion
from lsast_train.options import PRESETS
from lsast_train.paintings import PaintingDataset
from lsast_train.prompts.prompt_space import PromptSpace


def _space(contexts: torch.Tensor) -> PromptSpace:
    """The released layout and gradient over given contexts [12, T, dim]."""
    space = PromptSpace(contexts[0], generator="direct", layout="overlap", gradient="decoder")
    space.matrices.data = contexts.clone()
    return space


def _touched(space: PromptSpace) -> list[int]:
    assert space.matrices.grad is not None
    found: list[int] = space.matrices.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist()
    return found


def test_gradient_decoder_keeps_nothing_before_the_decoder(base: Base) -> None:
    space = _space(torch.randn(12, 4, 24))
    seen: dict[str, bool] = {}
    for name in ("conv_in", "mid_block", "up_blocks.0", "conv_out"):
        module = base.unet.get_submodule(name)
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.requires_grad}))
    noise_error(base, space, torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16), torch.tensor([5]), "no")
    assert seen == {"conv_in": False, "mid_block": False, "up_blocks.0": False, "conv_out": True}


@both_sets
def test_noise_error_of_a_released_training_step_is_the_recorded_one(golden: GoldenFiles) -> None:
    tokens, dim = golden.tensors("io")["unconditional"].shape
    base = build_base(
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
        assert _touched(space) == given["grad_index"].tolist()
        assert space.matrices.grad is not None
        error = (space.matrices.grad[given["grad_index"]][0] - given["grad"]).abs().max() / given["grad"].abs().max()
        assert error < 1e-4


def test_released_preset_trains_only_the_last_rows_of_decoder_prompts(
    text_base: Base, paintings: Path, tmp_path: Path
) -> None:
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
