"""What saves memory and time in a step, and changes its result little or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lsast_engines.errors import OutOfMemoryError, TrainingError, UsageError
from lsast_train import inversion
from lsast_train.base.base import Base
from lsast_train.inversion import Inversion

Invert = Callable[..., Inversion]


def _kept(run: Inversion) -> tuple[int, torch.Tensor]:
    """Bytes that one step keeps for the way back, and its gradient."""
    storages: dict[int, int] = {}
    frozen = {p.untyped_storage().data_ptr() for p in run.base.unet.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run.loss(0, 0)
    run.space.zero_grad()
    torch.autograd.backward(loss)
    assert run.space.matrices.grad is not None
    return sum(storages.values()), run.space.matrices.grad.clone()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradient(
    text_base: Base, invert: Invert, precision: Any
) -> None:
    kind = {"generator": "direct", "mixed_precision": precision}
    much, expected = _kept(invert(text_base, **kind))
    little, found = _kept(invert(text_base, **kind, gradient_checkpointing=True))
    assert little < 0.6 * much
    assert torch.equal(found, expected)
    assert found.abs().max() > 0
    invert(text_base, **kind)
    assert not text_base.unet.is_gradient_checkpointing


def test_run_without_memory_for_a_step_names_the_options_that_save_it(
    text_base: Base, invert: Invert, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    run = invert(text_base)
    monkeypatch.setattr(run, "loss", lacking)
    with pytest.raises(OutOfMemoryError, match="for a training step; expected more: --gradient-checkpointing, "):
        run.run()


def test_round_unet_gives_the_loss_and_gradient_of_autocast(text_base: Base, invert: Invert) -> None:
    for module in text_base.unet.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.normal_(module.weight)
    run = invert(text_base, mixed_precision="bf16")
    expected, size = run.loss(0, 0), sum(p.nbytes for p in text_base.unet.parameters())
    (gradient,) = torch.autograd.grad(expected, run.space.matrices)
    text_base.round_unet("bf16")
    found = run.loss(0, 0)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found, run.space.matrices)[0], gradient)
    assert sum(p.nbytes for p in text_base.unet.parameters()) < 0.52 * size


def test_gradient_accumulation_gives_the_mean_gradient_of_its_batches(text_base: Base, invert: Invert) -> None:
    run = invert(text_base, generator="direct", gradient_accumulation=2, lr=1e-9)
    first, second = (torch.autograd.grad(run.loss(3, 0, part), run.space.matrices)[0] for part in (0, 1))
    assert not torch.equal(first, second)
    run._train_step(3)
    torch.testing.assert_close(run.space.matrices.grad, (first + second) / 2)


def test_fp16_gives_nearly_the_gradient_of_float32_and_refuses_one_that_overflows(
    text_base: Base, invert: Invert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unscaled, its gradients would be zeros: they are below the smallest number of that type."""
    run = invert(text_base, "a", lr=1e-9)
    run._train_step(0)
    half = invert(text_base, "b", lr=1e-9, mixed_precision="fp16")
    half._train_step(0)
    found, expected = half.space.matrices.grad, run.space.matrices.grad
    assert found is not None
    assert expected is not None
    assert (found - expected).norm() < 0.05 * expected.norm()
    monkeypatch.setattr(inversion, "LOSS_SCALE", 1e38)
    with pytest.raises(TrainingError, match="the loss of step 0 is nan"):
        half._train_step(0)


def test_device_that_is_not_there_is_refused_and_controlnet_stays_where_it_is(text_base: Base, invert: Invert) -> None:
    with pytest.raises(UsageError, match=r"found --device nowhere .*; expected one of cpu"):
        invert(text_base, device="nowhere")
    assert invert(text_base, device="cpu").base.device.type == "cpu"
    text_base.to(torch.device("meta"), controlnet=False)
    assert text_base.unet.device.type == text_base.device.type == "meta"
    assert text_base.controlnet.device.type == "cpu"
