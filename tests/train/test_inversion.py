from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lsast_engines.errors import TrainingError
from lsast_train import inversion
from lsast_train.base.attention import layer_contexts
from lsast_train.base.base import Base
from lsast_train.evaluation import ValidationSet, noise_error
from lsast_train.inversion import Inversion
from lsast_train.paintings import PaintingDataset
from lsast_train.prompts.prompt_file import load_prompts
from lsast_train.prompts.prompt_space import PromptSpace
from schedulers import ddpm

Invert = Callable[..., Inversion]


def _weights(base: Base) -> dict[str, str]:
    return {
        f"{name}.{key}": hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        for name, network in base.networks().items()
        for key, value in network.state_dict().items()
    }


@pytest.mark.parametrize(
    "kind",
    [
        {"variant": "step+layer"},
        {"variant": "step+layer", "generator": "direct"},
        {"variant": "step+layer", "layout": "overlap", "gradient": "decoder"},
        {"variant": "step+layer", "layout": "overlap", "gradient": "decoder", "generator": "geglu", "lr": 0.01},
        {"variant": "step"},
        {"variant": "step", "generator": "direct"},
        {"variant": "layer"},
        {"variant": "layer", "generator": "direct"},
        {"variant": "global"},
        {"variant": "global", "generator": "direct"},
    ],
    ids=lambda kind: " ".join(map(str, kind.values())),
)
def test_inversion_of_every_variant_learns_and_leaves_the_base_unchanged(
    base: Base, invert: Invert, kind: dict[str, Any]
) -> None:
    before = _weights(base)
    outcome = invert(base, **kind, steps=16, batch=6, weighting="v", evaluate_every=16).run()
    assert _weights(base) == before
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
def test_dropout_acts_in_training_and_not_in_evaluation(
    text_base: Base, invert: Invert, monkeypatch: Any, generator: Any
) -> None:
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


def test_loss_of_another_step_or_process_draws_another_batch(base: Base, invert: Invert) -> None:
    run = invert(base)
    assert len({run.loss(step, process).item() for step in range(2) for process in range(2)}) == 4


def test_timesteps_are_uniform_and_learning_rates_follow_the_schedule(
    base: Base, invert: Invert, monkeypatch: pytest.MonkeyPatch, after_step: Callable[..., None]
) -> None:
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
def test_loss_with_weighting_v_is_the_error_of_v(
    base: Base, invert: Invert, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
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


def test_inversion_keeps_the_prompts_of_the_best_evaluation(
    base: Base, invert: Invert, monkeypatch: pytest.MonkeyPatch, after_step: Callable[..., None]
) -> None:
    # Means over stages would prefer step 4 (5.0 < 5.1); relative to the untrained, step 2 is better.
    scripted = [[8.0] + [0.1] * 9, [8.0] + [0.05] * 9, [5.0] + [0.1] * 9]
    calls: list[None] = []

    def losses(*_: Any) -> torch.Tensor:
        calls.append(None)
        return torch.tensor(scripted[(len(calls) - 1) // 2], dtype=torch.float64)

    monkeypatch.setattr(ValidationSet, "losses", losses)
    seen: dict[int, torch.Tensor] = {}
    run = invert(base, steps=4, evaluate_every=2)
    after_step(lambda step: seen.update({step: run.space.prompts().detach().clone()}))
    outcome = run.run()
    assert outcome.best_step == 2
    assert outcome.relative_loss == pytest.approx((1 + 9 * 0.5) / 10)
    assert torch.equal(load_prompts(outcome.file).prompts, seen[2])


def test_inversion_that_overfits_at_once_warns_and_keeps_the_untrained_prompts(
    base: Base, invert: Invert, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.3, 0.3, 0.4, 0.2])  # held-out and training, untrained and trained: this run over-fits
    monkeypatch.setattr(ValidationSet, "losses", lambda *_: torch.full((10,), next(losses), dtype=torch.float64))
    run = invert(base)
    untrained = run.space.prompts().detach().clone()
    with caplog.at_level(logging.WARNING, "lsast"):
        outcome = run.run()
    assert (outcome.best_step, outcome.relative_loss) == (0, 1.0)
    assert torch.equal(load_prompts(outcome.file).prompts, untrained)
    assert "no step lowered the held-out loss" in caplog.text


def test_inversion_with_a_nan_loss_raises(base: Base, invert: Invert) -> None:
    torch.nn.init.constant_(base.unet.conv_out.weight, float("nan"))
    with pytest.raises(TrainingError, match=r"loss of step 0 is nan; lower --lr"):
        invert(base).run()


@pytest.mark.parametrize(("steps", "views"), [(1, 2), (100, 8)])
def test_cached_crops_are_no_more_than_training_can_draw(
    base: Base, invert: Invert, collection: PaintingDataset, steps: int, views: int
) -> None:
    """Four crops of each painting and their mirror images, or one crop where few pictures are drawn."""
    run = invert(base, views=4, steps=steps, batch=4)
    assert len(run.latents) == views * len(collection.training)
