from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from lsast_engines.errors import TrainingError, UsageError
from lsast_train import inversion
from lsast_train.base.attention import layer_contexts
from lsast_train.base.base import Base
from lsast_train.evaluation import Probe, Purpose, noise_error, round_unet, seeded
from lsast_train.inversion import Inversion
from lsast_train.mini.architecture import MiniConfig, build_mini
from lsast_train.options import TrainOptions
from lsast_train.paintings import Collection, EncodedViews
from lsast_train.prompts.prompt_file import load_prompts
from lsast_train.prompts.prompt_space import PromptSpace
from lsast_train.training.signals import InterruptionError


def _weights(base: Base) -> dict[str, str]:
    return {
        f"{name}.{key}": hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
        for name, network in base.networks().items()
        for key, value in network.state_dict().items()
    }


def _interrupt_at(step: int) -> Callable[[int, float], None]:
    def on_step(now: int, _: float) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def _schedule() -> Any:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def _alphas() -> torch.Tensor:
    alphas: torch.Tensor = _schedule().alphas_cumprod
    return alphas


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
def test_every_variant_learns_and_the_base_stays_as_it_was(
    base: Base, collection: Collection, brief: TrainOptions, tmp_path: Path, kind: dict[str, Any]
) -> None:
    before = _weights(base)
    options = replace(brief, **kind, steps=16, batch=6, weighting="v", evaluate_every=16)
    outcome = Inversion(base, collection, options, "red", tmp_path).run()
    assert _weights(base) == before
    assert not any(
        parameter.requires_grad for network in base.networks().values() for parameter in network.parameters()
    )
    curve = json.loads(outcome.curve.read_text())
    untrained, trained = curve["evaluations"]
    parts = [new / old for new, old in zip(trained["held_out"], untrained["held_out"], strict=True)]
    assert outcome.best_step == 16
    assert outcome.relative == pytest.approx(sum(parts) / 10)
    assert outcome.relative < 0.97
    prompts = load_prompts(outcome.prompts, base)
    assert prompts.prompts.shape == (10, 3, 4, 24)


@pytest.mark.parametrize("views", [0, 1], ids=["fresh", "encoded"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    collection: Collection, brief: TrainOptions, tmp_path: Path, views: int
) -> None:
    options = replace(brief, views=views, evaluate_every=8)

    def make(folder: str, **how: Any) -> Inversion:
        return Inversion(build_mini(MiniConfig.tiny()), collection, options, "red", tmp_path / folder, **how)

    straight = make("straight").run()
    # The signal of step 5 is noticed in step 6: half of a window between evaluations is carried over.
    with pytest.raises(InterruptionError, match=r"after step 6; .* --resume") as caught:
        make("parts", on_step=_interrupt_at(5)).run()
    assert caught.value.exit_code == 130
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["red.checkpoint.safetensors"]
    resumed = make("parts", resume=True).run()
    assert resumed.prompts.read_bytes() == straight.prompts.read_bytes()
    assert resumed.curve.read_text() == straight.curve.read_text()
    assert (resumed.steps, resumed.best_step) == (10, straight.best_step)
    assert not (tmp_path / "parts" / "red.checkpoint.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "kind",
    [
        {"generator": "geglu", "layout": "overlap", "gradient": "decoder"},
        {"generator": "attention", "placeholder_tokens": 2},
        {"generator": "direct", "prompt": "context"},
    ],
    ids=lambda kind: " ".join(map(str, kind.values())),
)
def test_prompts_for_a_base_with_a_text_encoder_learn_and_resume(
    text_base: Base, collection: Collection, brief: TrainOptions, tmp_path: Path, kind: dict[str, Any]
) -> None:
    """Bit for bit, with the generator's dropout."""
    lr = 0.01 if kind["generator"] == "geglu" else 1.0
    options = replace(brief, **kind, lr=lr, map_lr=0.0, batch=6, evaluate_latents=2)
    before = _weights(text_base), copy.deepcopy(text_base.text_encoder.state_dict())
    straight = Inversion(text_base, collection, options, "red", tmp_path / "straight").run()
    assert (straight.best_step, straight.relative < 0.9999) == (10, True)
    with pytest.raises(InterruptionError):
        Inversion(text_base, collection, options, "red", tmp_path / "parts", on_step=_interrupt_at(4)).run()
    resumed = Inversion(text_base, collection, options, "red", tmp_path / "parts", resume=True).run()
    assert resumed.prompts.read_bytes() == straight.prompts.read_bytes()
    assert _weights(text_base) == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in text_base.text_encoder.state_dict().items())
    prompts = load_prompts(straight.prompts, text_base)
    assert prompts.prompts.shape == (10, 3, 77, 24)
    assert prompts.prompt == kind.get("prompt", "text")
    assert json.loads(prompts.meta["options"])["generator"] == kind["generator"]


@pytest.mark.parametrize("generator", ["geglu", "direct"])
def test_dropout_is_on_in_training_and_off_in_evaluation(
    text_base: Base, collection: Collection, brief: TrainOptions, tmp_path: Path, monkeypatch: Any, generator: Any
) -> None:
    run = Inversion(text_base, collection, replace(brief, generator=generator), "red", tmp_path)
    losses = [run.loss(0, 0).item(), run.loss(0, 0).item()]
    monkeypatch.setattr("lsast_train.prompts.released_generator.DROPOUT", 0.0)
    without = run.loss(0, 0).item()
    assert losses[0] == losses[1]
    assert (losses[0] == without) == (generator == "direct")
    monkeypatch.setattr("lsast_train.prompts.released_generator.DROPOUT", 0.5)
    probe = run._probes[0]
    found = probe.losses(run.space, [3])
    monkeypatch.setattr("lsast_train.prompts.released_generator.DROPOUT", 0.0)
    assert torch.equal(probe.losses(run.space, [3]), found)


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_keeps_less_and_changes_no_gradient(
    text_base: Base, collection: Collection, brief: TrainOptions, tmp_path: Path, precision: Any
) -> None:
    options = replace(brief, generator="direct", precision=precision)
    much, expected = _kept(Inversion(text_base, collection, options, "red", tmp_path))
    thrifty = Inversion(text_base, collection, replace(options, gradient_checkpointing=True), "red", tmp_path)
    little, found = _kept(thrifty)
    assert little < 0.6 * much
    assert torch.equal(found, expected)
    assert found.abs().max() > 0
    Inversion(text_base, collection, options, "red", tmp_path)
    assert not text_base.unet.is_gradient_checkpointing


def test_a_unet_stored_in_bf16_computes_what_rounding_at_every_call_does(
    text_base: Base, collection: Collection, brief: TrainOptions, tmp_path: Path
) -> None:
    for module in text_base.unet.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.normal_(module.weight)
    run = Inversion(text_base, collection, replace(brief, precision="bf16"), "red", tmp_path)
    expected, size = run.loss(0, 0), sum(p.nbytes for p in text_base.unet.parameters())
    (gradient,) = torch.autograd.grad(expected, run.space.matrices)
    round_unet(text_base)
    found = run.loss(0, 0)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found, run.space.matrices)[0], gradient)
    assert sum(p.nbytes for p in text_base.unet.parameters()) < 0.52 * size


def test_contexts_stay_in_fp32_where_the_unet_computes_in_bf16(
    text_base: Base, collection: Collection, brief: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Inversion(text_base, collection, replace(brief, precision="bf16"), "red", tmp_path)
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


def test_checkpoints_are_not_lost_nor_mixed_up(
    base: Base, collection: Collection, brief: TrainOptions, paintings: Path, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"found no checkpoint .* start without --resume"):
        Inversion(base, collection, brief, "red", tmp_path, resume=True)
    with pytest.raises(InterruptionError):
        Inversion(base, collection, brief, "red", tmp_path, on_step=_interrupt_at(1)).run()
    with pytest.raises(TrainingError, match="unfinished run"):
        Inversion(base, collection, brief, "red", tmp_path)
    others = Collection(collection.training[1:], collection.held_out, "other paintings")
    with pytest.raises(TrainingError) as caught:
        Inversion(base, others, replace(brief, lr=0.2, seed=7), "red", tmp_path, resume=True)
    found = {line.split(":")[0].strip(" -") for line in str(caught.value).splitlines()[1:]}
    assert found == {"lr", "seed", "paintings"}
    with pytest.raises(TrainingError, match="other options"):
        Inversion(base, collection, replace(brief, variant="global"), "red", tmp_path, resume=True)
    checkpoint = tmp_path / "red.checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(TrainingError, match="not a checkpoint"):
        Inversion(base, collection, brief, "red", tmp_path, resume=True)


def test_a_step_moves_only_the_matrices_of_its_stage(
    base: Base, collection: Collection, brief: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[torch.Tensor] = []

    def spy(*arguments: Any) -> torch.Tensor:
        times.append(arguments[4])
        return noise_error(*arguments)

    monkeypatch.setattr(inversion, "noise_error", spy)
    run = Inversion(base, collection, replace(brief, steps=1, batch=1, generator="direct"), "red", tmp_path)
    before = run.space.matrices.detach().clone()
    run.run()
    (time,) = times
    moved = (run.space.matrices - before).flatten(1).abs().sum(1).nonzero().flatten().tolist()
    stage = int(time) // 100
    assert moved == [3 * stage, 3 * stage + 1, 3 * stage + 2]
    # AdamW's first step is the sign of the gradient times the learning rate (Kingma & Ba 2015, algorithm 1).
    step = (run.space.matrices - before)[moved].abs()
    assert step.median().item() == pytest.approx(0.1, rel=0.01)


def test_timesteps_are_uniform_and_the_optimiser_follows_the_schedule(
    base: Base, collection: Collection, brief: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[torch.Tensor] = []
    rates: list[list[float]] = []

    def stub(_: Base, space: PromptSpace, latents: torch.Tensor, __: Any, timestep: torch.Tensor, *___: Any) -> Any:
        times.append(timestep)
        return space.contexts(timestep).mean((1, 2, 3))

    monkeypatch.setattr(inversion, "noise_error", stub)
    options = replace(brief, steps=40, batch=100, schedule="step", decay_after=30, lr=0.01, map_lr=0.5)
    run = Inversion(base, collection, options, "red", tmp_path)
    run._on_step = lambda *_: rates.append([group["lr"] for group in run.optimizer.param_groups])
    run.run()
    assert rates == [pytest.approx([0.01, 0.005])] * 30 + [pytest.approx([0.001, 0.0005])] * 10
    drawn = torch.cat(times)
    assert 0 <= drawn.min() < 5
    assert 995 <= drawn.max() < 1000
    counts = torch.bincount(drawn // 100, minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("seed", range(6))
def test_weighting_v_is_the_error_of_v(
    base: Base, collection: Collection, brief: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    seen: dict[str, Any] = {}

    def spy(*arguments: Any) -> torch.Tensor:
        seen["latents"], seen["noise"], seen["time"] = arguments[2:5]
        return noise_error(*arguments)

    monkeypatch.setattr(inversion, "noise_error", spy)
    run = Inversion(base, collection, replace(brief, weighting="v", batch=1), "red", tmp_path)
    loss = run.loss(step=seed, process=0)
    latents, noise, time = seen["latents"], seen["noise"], seen["time"]
    schedule = _schedule()
    noisy, kwargs = schedule.add_noise(latents, noise, time), layer_contexts(run.space.contexts(time))
    output = base.unet(noisy, time, None, cross_attention_kwargs=kwargs, return_dict=False)[0]
    error = (output - schedule.get_velocity(latents, noise, time)).square().mean()
    limit = 20 * schedule.alphas_cumprod[time].item()
    torch.testing.assert_close(loss, error * min(1, limit), rtol=1e-4, atol=1e-6)


def test_processes_and_steps_draw_their_own_batches(
    base: Base, collection: Collection, brief: TrainOptions, tmp_path: Path
) -> None:
    run = Inversion(base, collection, brief, "red", tmp_path)
    losses = {run.loss(step, process).item() for step in range(3) for process in range(3)}
    assert len(losses) == 9
    assert run.loss(1, 2).item() in losses


def _stub_base(eps: Callable[..., torch.Tensor]) -> Any:
    config = SimpleNamespace(noise=SimpleNamespace(train_steps=1000))
    return SimpleNamespace(eps=eps, add_noise=_schedule().add_noise, config=config)


def test_a_perfect_base_has_no_error_and_a_blind_one_that_of_the_noise() -> None:
    alphas = _alphas()
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).expand(5, -1, -1, -1)

    def perfect(noisy: torch.Tensor, time: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        abar = alphas[time].view(-1, 1, 1, 1)
        return (noisy - abar.sqrt() * latents[:1]) / (1 - abar).sqrt()

    space = PromptSpace(torch.randn(4, 8))
    found = Probe(_stub_base(perfect), latents, 0, "fp32").losses(space, range(10))
    assert found.max() < 1e-6
    blind = Probe(_stub_base(lambda noisy, *_: torch.zeros_like(noisy)), latents, 0, "fp32")
    found = blind.losses(space, [2, 7])
    assert found.nonzero().flatten().tolist() == [2, 7]
    assert found[[2, 7]].numpy() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(blind.losses(space, []), torch.zeros(10, dtype=torch.float64))


def test_the_loss_of_a_stage_is_the_mean_of_its_own_rows() -> None:
    """A base that is off by its timestep / 100 everywhere."""
    alphas = _alphas()
    latents = torch.zeros(3, 4, 8, 8)

    def off(noisy: torch.Tensor, time: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return noisy / (1 - alphas[time]).sqrt().view(-1, 1, 1, 1) + time.view(-1, 1, 1, 1) / 100

    found = Probe(_stub_base(off), latents, 0, "fp32").losses(PromptSpace(torch.randn(4, 8)), range(10))
    # Three latents, so the middles of the thirds of each stage: 16, 50, 83, then 116, 150 …
    expected = [sum((stage + part) ** 2 for part in (0.16, 0.5, 0.83)) / 3 for stage in range(10)]
    assert found.numpy() == pytest.approx(expected, rel=1e-4)


def test_the_probe_uses_the_same_noise_every_time_and_another_for_every_row() -> None:
    seen: list[torch.Tensor] = []

    def eps(noisy: torch.Tensor, time: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        seen.append(noisy / (1 - _alphas()[time]).sqrt().view(-1, 1, 1, 1))
        return torch.zeros_like(noisy)

    probe = Probe(_stub_base(eps), torch.zeros(2, 4, 8, 8), 0, "fp32")
    space = PromptSpace(torch.randn(4, 8))
    first = probe.losses(space, range(10))
    torch.testing.assert_close(probe.losses(space, reversed(range(10))), first)
    noise = torch.cat(seen)[:20]
    assert torch.cdist(noise.flatten(1), noise.flatten(1)).add(100 * torch.eye(20)).min() > 10


def test_the_prompts_of_the_best_evaluation_are_kept(
    base: Base, collection: Collection, brief: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Means over stages would prefer step 4 (5.0 < 5.1); relative to the untrained, step 2 is better.
    scripted = [[8.0] + [0.1] * 9, [8.0] + [0.05] * 9, [5.0] + [0.1] * 9]
    calls: list[None] = []

    def losses(*_: Any) -> torch.Tensor:
        calls.append(None)
        return torch.tensor(scripted[(len(calls) - 1) // 2], dtype=torch.float64)

    monkeypatch.setattr(Probe, "losses", losses)
    seen: dict[int, torch.Tensor] = {}
    run = Inversion(base, collection, replace(brief, steps=4, evaluate_every=2), "red", tmp_path)
    run._on_step = lambda step, _: seen.update({step: run.space.prompts().detach().clone()})
    outcome = run.run()
    assert outcome.best_step == 2
    assert outcome.relative == pytest.approx((1 + 9 * 0.5) / 10)
    assert torch.equal(load_prompts(outcome.prompts).prompts, seen[2])


def test_a_run_that_learns_nothing_says_so_and_keeps_the_untrained_prompts(
    base: Base,
    collection: Collection,
    brief: TrainOptions,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter([0.3, 0.3, 0.4, 0.2])  # held-out and training, untrained and trained: this run over-fits
    monkeypatch.setattr(Probe, "losses", lambda *_: torch.full((10,), next(losses), dtype=torch.float64))
    run = Inversion(base, collection, brief, "red", tmp_path)
    untrained = run.space.prompts().detach().clone()
    with caplog.at_level(logging.WARNING, "lsast"):
        outcome = run.run()
    assert (outcome.best_step, outcome.relative) == (0, 1.0)
    assert torch.equal(load_prompts(outcome.prompts).prompts, untrained)
    assert "no step lowered the held-out loss" in caplog.text


def test_a_loss_that_is_no_number_stops_the_run(
    base: Base, collection: Collection, brief: TrainOptions, tmp_path: Path
) -> None:
    torch.nn.init.constant_(base.unet.conv_out.weight, float("nan"))
    with pytest.raises(TrainingError, match=r"loss of step 0 is nan; lower --lr"):
        Inversion(base, collection, brief, "red", tmp_path).run()


def test_bf16_is_near_fp32_and_keeps_the_prompts_in_fp32(
    base: Base, collection: Collection, brief: TrainOptions, tmp_path: Path
) -> None:
    exact = Inversion(base, collection, brief, "red", tmp_path)
    rough = Inversion(base, collection, replace(brief, precision="bf16"), "red", tmp_path)
    losses = [run.loss(0, 0) for run in (exact, rough)]
    assert losses[0].item() != losses[1].item()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.03)
    for run, loss in zip((exact, rough), losses, strict=True):
        torch.autograd.backward(loss)
        assert run.space.matrices.grad is not None
        assert run.space.matrices.grad.dtype == torch.float32


def test_names_and_sizes_that_cannot_be_meant_are_refused_together(
    base: Base, collection: Collection, brief: TrainOptions, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        Inversion(base, collection, replace(brief, size=100), "../red", tmp_path)
    assert "multiple of 64" in str(caught.value)
    assert "'../red'" in str(caught.value)


def test_every_purpose_and_number_has_its_own_random_numbers() -> None:
    keys = [(seed, purpose, *rest) for seed in (0, 1) for purpose in Purpose for rest in ((), (1,), (0, 1), (1, 1))]
    drawn = {torch.rand(1, generator=seeded(*key), dtype=torch.float64).item() for key in keys}
    assert len(drawn) == len(keys)
    assert torch.rand(1, generator=seeded(*keys[7])) == torch.rand(1, generator=seeded(*keys[7]))


@pytest.mark.parametrize(("steps", "views"), [(1, 2), (100, 8)])
def test_no_more_views_are_encoded_than_training_can_draw(
    base: Base, collection: Collection, brief: TrainOptions, tmp_path: Path, steps: int, views: int
) -> None:
    """Four crops of each painting and their mirror images, or one crop where few pictures are drawn."""
    run = Inversion(base, collection, replace(brief, views=4, steps=steps, batch=4), "red", tmp_path)
    assert isinstance(run._source, EncodedViews)
    assert len(run._source) == views * len(collection.training)
