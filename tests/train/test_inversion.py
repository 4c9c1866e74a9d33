"""Inversion: what it learns, how it is stopped and goes on, what saves memory and time."""

import copy
import itertools
import json
import logging
import re
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from benchmarks.mini.training.mini_base import MiniConfig, build_mini
from lsast_engines.errors import OutOfMemoryError, TrainingError, UsageError
from lsast_train import inversion
from lsast_train.base.attention import layer_contexts
from lsast_train.base.base import Base
from lsast_train.evaluation import ValidationSet, noise_error
from lsast_train.inversion import Inversion
from lsast_train.paintings import PaintingDataset
from lsast_train.prompts.prompt_file import load_prompts
from lsast_train.prompts.prompt_space import PromptSpace
from lsast_train.training.run import InterruptionError
from schedulers import ddpm

from .conftest import weights


@pytest.mark.parametrize(
    "kind",
    [
        {"variant": "step+layer"},
        {"variant": "step+layer", "generator": "direct"},
        {"variant": "step+layer", "layout": "overlap", "gradient": "decoder", "generator": "geglu", "lr": 0.01},
        {"variant": "global"},
    ],
    ids=lambda kind: " ".join(map(str, kind.values())),
)
def test_inversion_of_every_variant_learns_and_leaves_the_base_unchanged(base, invert, kind):
    before = weights(base)
    outcome = invert(base, **kind, steps=16, batch=6, weighting="v", evaluate_every=16).run()
    assert all(torch.equal(value, before[key]) for key, value in weights(base).items())
    assert not any(
        parameter.requires_grad for network in base.networks().values() for parameter in network.parameters()
    )
    curve = json.loads(outcome.curve.read_text())
    untrained, trained = curve["evaluations"]
    parts = [new / old for new, old in zip(trained["held_out"], untrained["held_out"], strict=True)]
    assert outcome.best_step == 16
    assert outcome.relative_loss == pytest.approx(sum(parts) / 10)
    assert outcome.relative_loss < 0.97
    prompts = load_prompts(outcome.file, base)
    assert prompts.prompts.shape == (10, 3, 4, 24)


@pytest.mark.parametrize("generator", ["geglu", "direct"])
def test_dropout_acts_in_training_and_not_in_evaluation(text_base, invert, monkeypatch, generator):
    run = invert(text_base, generator=generator)
    losses = [run.loss(0, 0).item(), run.loss(0, 0).item()]
    monkeypatch.setattr("lsast_train.prompts.released_generator.DROPOUT", 0.0)
    without = run.loss(0, 0).item()
    assert losses[0] == losses[1]
    assert (losses[0] == without) == (generator == "direct")
    monkeypatch.setattr("lsast_train.prompts.released_generator.DROPOUT", 0.5)
    probe = run.held_out
    found = probe.losses(run.space, [3])
    monkeypatch.setattr("lsast_train.prompts.released_generator.DROPOUT", 0.0)
    assert torch.equal(probe.losses(run.space, [3]), found)


def test_timesteps_are_uniform_and_learning_rates_follow_the_schedule(base, invert, monkeypatch, after_step):
    times: list[torch.Tensor] = []
    rates: list[list[float]] = []

    def stub(_: Base, space: PromptSpace, latents: torch.Tensor, __: Any, timestep: torch.Tensor, *___: Any) -> Any:
        times.append(timestep)
        return space.contexts(timestep).mean((1, 2, 3))

    monkeypatch.setattr(inversion, "noise_error", stub)
    run = invert(base, steps=40, batch=100, schedule="step", decay_after=30, lr=0.01, map_lr=0.5)
    after_step(lambda _: rates.append([group["lr"] for group in run.optimizer.param_groups]))
    run.run()
    assert rates == [pytest.approx([0.01, 0.005])] * 30 + [pytest.approx([0.001, 0.0005])] * 10
    drawn = torch.cat(times)
    assert 0 <= drawn.min() < 5
    assert 995 <= drawn.max() < 1000
    counts = torch.bincount(drawn // 100, minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("seed", range(3))
def test_loss_with_weighting_v_is_the_error_of_v(base, invert, monkeypatch, seed):
    seen: dict[str, Any] = {}

    def spy(*arguments: Any) -> torch.Tensor:
        seen["latents"], seen["noise"], seen["time"] = arguments[2:5]
        return noise_error(*arguments)

    monkeypatch.setattr(inversion, "noise_error", spy)
    run = invert(base, weighting="v", batch=1)
    loss = run.loss(step=seed, process=0)
    latents, noise, time = seen["latents"], seen["noise"], seen["time"]
    schedule = ddpm()
    noisy, kwargs = schedule.add_noise(latents, noise, time), layer_contexts(run.space.contexts(time))
    output = base.unet(noisy, time, None, cross_attention_kwargs=kwargs, return_dict=False)[0]
    error = (output - schedule.get_velocity(latents, noise, time)).square().mean()
    limit = 20 * schedule.alphas_cumprod[time].item()
    torch.testing.assert_close(loss, error * min(1, limit), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("held_out", "training", "best", "relative"),
    [
        # Means over stages would prefer step 4 (5.0 < 5.1); relative to the untrained, step 2 is better.
        ([[8.0] + [0.1] * 9, [8.0] + [0.05] * 9, [5.0] + [0.1] * 9], [1, 1, 1], 2, (1 + 9 * 0.5) / 10),
        ([[0.3] * 10, [0.4] * 10, [0.5] * 10], [0.3, 0.2, 0.1], 0, 1.0),
    ],
    ids=["unequal stages", "over-fitting"],
)
def test_inversion_keeps_the_prompts_of_the_best_evaluation(
    base, invert, monkeypatch, after_step, caplog, held_out, training, best, relative
):
    each = itertools.chain(*zip(held_out, [[loss] * 10 for loss in training], strict=True))
    monkeypatch.setattr(ValidationSet, "losses", lambda *_: torch.tensor(next(each), dtype=torch.float64))
    run = invert(base, steps=4, evaluate_every=2)
    seen = {0: run.space.prompts().detach().clone()}
    after_step(lambda step: seen.update({step: run.space.prompts().detach().clone()}))
    with caplog.at_level(logging.WARNING, "lsast"):
        outcome = run.run()
    assert (outcome.best_step, outcome.relative_loss) == (best, pytest.approx(relative))
    assert torch.equal(load_prompts(outcome.file).prompts, seen[best])
    assert ("no step lowered the held-out loss" in caplog.text) == (best == 0)


def test_inversion_with_a_nan_loss_raises(base, invert):
    torch.nn.init.constant_(base.unet.conv_out.weight, float("nan"))
    with pytest.raises(TrainingError, match=r"loss of step 0 is nan; lower --lr"):
        invert(base).run()


def test_resumed_inversion_equals_the_uninterrupted_one_bit_for_bit(invert, stop_and_resume):
    # Part of the mean loss since the last evaluation is carried over.
    stop_and_resume(lambda *at, **how: invert(build_mini(MiniConfig.tiny()), *at, evaluate_every=8, **how), 6)


@pytest.mark.parametrize(
    "kind",
    [
        {"generator": "geglu", "layout": "overlap", "gradient": "decoder"},
        {"generator": "attention", "placeholder_tokens": 2},
    ],
    ids=lambda kind: " ".join(map(str, kind.values())),
)
def test_resumed_inversion_through_a_text_encoder_equals_the_straight_one(text_base, invert, stop_and_resume, kind):
    """Bit for bit, with the generator's dropout."""
    lr = 0.01 if kind["generator"] == "geglu" else 1.0
    options = {**kind, "lr": lr, "map_lr": 0.0, "batch": 6, "evaluate_latents": 2}
    before = copy.deepcopy(text_base.text_encoder.state_dict())
    result = stop_and_resume(lambda *at, **how: invert(text_base, *at, **options, **how), 4)
    assert (result.best_step, result.relative_loss < 0.9999) == (10, True)
    assert all(torch.equal(v, before[k]) for k, v in text_base.text_encoder.state_dict().items())
    prompts = load_prompts(result.file, text_base)
    assert prompts.prompts.shape == (10, 3, 77, 24)
    assert prompts.prompt == "text"
    assert json.loads(prompts.meta["options"])["generator"] == kind["generator"]


def test_checkpoint_that_does_not_fit_the_run_is_refused(base, invert, collection, brief, tmp_path, interrupt_at):
    with pytest.raises(TrainingError, match=r"found no checkpoint .* start without --resume"):
        invert(base, resume=True)
    interrupt_at(1)
    with pytest.raises(InterruptionError):
        invert(base).run()
    others = PaintingDataset(collection.training[1:], collection.held_out, "other paintings")
    with pytest.raises(TrainingError) as caught:
        Inversion(base, others, replace(brief, lr=0.2, seed=7), "red", tmp_path, resume=True)
    found = {line.split(":")[0].strip(" -") for line in str(caught.value).splitlines()[1:]}
    assert found == {"lr", "seed", "paintings"}
    with pytest.raises(TrainingError, match="other options"):
        invert(base, resume=True, variant="global")
    checkpoint = tmp_path / "red.checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(TrainingError, match="not a checkpoint"):
        invert(base, resume=True)


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
    return sum(storages.values()), run.space.matrices.grad.clone()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradient(text_base, invert, precision):
    kind = {"generator": "direct", "mixed_precision": precision}
    much, expected = _kept(invert(text_base, **kind))
    little, found = _kept(invert(text_base, **kind, gradient_checkpointing=True))
    assert little < 0.6 * much
    assert torch.equal(found, expected)
    assert found.abs().max() > 0
    invert(text_base, **kind)
    assert not text_base.unet.is_gradient_checkpointing


def test_run_without_memory_for_a_step_names_the_options_that_save_it(text_base, invert, monkeypatch):
    def lacking(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    run = invert(text_base)
    monkeypatch.setattr(run, "loss", lacking)
    with pytest.raises(OutOfMemoryError, match="for a training step; expected more: --gradient-checkpointing, "):
        run.run()


def test_round_unet_gives_the_loss_and_gradient_of_autocast(text_base, invert):
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


def test_gradient_accumulation_gives_the_mean_gradient_of_its_batches(text_base, invert):
    run = invert(text_base, generator="direct", gradient_accumulation=2, lr=1e-9)
    first, second = (torch.autograd.grad(run.loss(3, 0, part), run.space.matrices)[0] for part in (0, 1))
    assert not torch.equal(first, second)
    run._train_step(3)
    torch.testing.assert_close(run.space.matrices.grad, (first + second) / 2)


def test_fp16_gives_nearly_the_gradient_of_float32_and_refuses_one_that_overflows(text_base, invert, monkeypatch):
    """Unscaled, its gradients would be zeros: they are below the smallest number of that type."""
    run = invert(text_base, "a", lr=1e-9)
    run._train_step(0)
    half = invert(text_base, "b", lr=1e-9, mixed_precision="fp16")
    half._train_step(0)
    found, expected = half.space.matrices.grad, run.space.matrices.grad
    assert (found - expected).norm() < 0.05 * expected.norm()
    monkeypatch.setattr(inversion, "LOSS_SCALE", 1e38)
    with pytest.raises(TrainingError, match="the loss of step 0 is nan"):
        half._train_step(0)


def test_device_that_is_not_there_is_refused_and_controlnet_stays_where_it_is(text_base, invert):
    with pytest.raises(UsageError, match=r"found --device nowhere .*; expected one of cpu"):
        invert(text_base, device="nowhere")
    assert invert(text_base, device="cpu").base.device.type == "cpu"
    text_base.to(torch.device("meta"), controlnet=False)
    assert text_base.unet.device.type == text_base.device.type == "meta"
    assert text_base.controlnet.device.type == "cpu"


def test_seconds_and_hours_are_told_before_the_first_evaluation_and_change_nothing(
    base, collection, brief, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    told = Inversion(base, collection, brief, "told", tmp_path / "told")
    with monkeypatch.context() as patch:
        patch.setattr(ValidationSet, "losses", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            told.run()
    found = re.search(r"([\d.e-]+) s a step: ([\d.e-]+) hours for at most 10 more", caplog.text)
    # 10 steps, and one evaluation of 10 stages of 4 + 4 latents, each 4 rows of which take half a step.
    assert float(found[2]) == pytest.approx(float(found[1]) * (10 + 10) / 3600, rel=0.1)
    silent = Inversion(base, collection, brief, "silent", tmp_path / "silent")
    monkeypatch.setattr(silent, "_estimate_time", lambda: None)
    results = [load_prompts(run.run().file).prompts for run in (told, silent)]
    assert torch.equal(*results)


@pytest.mark.parametrize(("steps", "views"), [(1, 2), (100, 8)])
def test_cached_crops_are_no_more_than_training_can_draw(base, invert, collection, steps, views):
    """Four crops of each painting and their mirror images, or one crop where few pictures are drawn."""
    run = invert(base, views=4, steps=steps, batch=4)
    assert len(run.latents) == views * len(collection.training)
