import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lsast.sampling.batch import Palette
from lsast_engines.bundle.style import decode_defaults
from lsast_engines.diffusion import TimestepSchedule
from lsast_train.base.base import Base
from lsast_train.base.lazy_base import save_base
from lsast_train.finetuning import finetuning
from lsast_train.finetuning.finetuning import Finetuning
from lsast_train.finetuning.painter import Painter, random_pictures
from lsast_train.options import FinetuneOptions
from lsast_train.prompts.prompt_file import Prompts, load_prompts, save_prompts
from lsast_train.training.rng import RngStream, rng_for
from lsast_train.training.run import RunFiles

from ..conftest import weights

pytest.importorskip("efficientnet_lite_pytorch")

BRIEF = FinetuneOptions(steps=6, batch=2, lr=0.3, size=64, strength=0.6, guidance=2.0, mixed_precision="no",
                        evaluate_every=3, content_weight=1.0)  # fmt: skip


@pytest.fixture
def painter(base: Base, prompts: Prompts) -> Painter:
    return Painter(base, prompts, strength=0.3, guidance=2.0, palette=0.8, mixed_precision="no")


def test_finetuning_lowers_the_held_out_loss_and_leaves_the_base_unchanged(
    base, collection, contents, prompts, tmp_path
):
    before = weights(base)
    run = Finetuning(base, prompts, collection, contents, BRIEF, "redder", tmp_path)
    assert (run.painter.strength, run.painter.guidance, run.painter.share) == (0.6, 2.0, 0.8)
    result = run.run()
    assert result.relative_loss < 0.99
    assert all(torch.equal(value, before[key]) for key, value in weights(base).items())
    tuned = load_prompts(result.file, base)
    assert (tuned.name, tuned.variant, tuned.generator) == ("redder", "step+layer", "direct")
    assert decode_defaults(tuned.meta) == ({"strength": 0.6, "guidance": 2.0, "palette": 0.8}, [])
    assert tuned.meta["works"] == prompts.meta["works"]
    # Strength 0.6 reaches stages 0 to 5 or 6; no other prompt may move.
    moved = (tuned.prompts - prompts.prompts).abs().amax((1, 2, 3)) > 0
    assert moved.any()
    assert not moved[7:].any()
    history = json.loads(result.curve.read_text())["history"]
    assert [row["step"] for row in history] == [0, 3, 6]
    assert history[-1]["held_out"] == pytest.approx(result.relative_loss * history[0]["held_out"])


def test_resumed_finetuning_equals_the_uninterrupted_one(
    base, collection, contents, prompts, tmp_path, stop_and_resume, monkeypatch
):
    monkeypatch.setattr(finetuning, "HELD_OUT", 2)
    options = replace(BRIEF, steps=4, evaluate_every=2, strength=0.2)

    def make(name: str, resume: bool = False, **changes: Any) -> Finetuning:
        chosen = replace(options, **changes)
        return Finetuning(base, prompts, collection, contents, chosen, "redder", tmp_path / name, resume)

    stop_and_resume(make, 3, guidance=3.0)


def test_finetune_command_refuses_a_folder_that_another_run_trains_in(base, prompts, paintings, tmp_path, command):
    files = RunFiles(tmp_path, "red")
    save_prompts(replace(prompts, base=save_base(base, tmp_path / "base")), files.result)
    arguments = ["--style", files.result, "--base", tmp_path / "base", "--images", paintings, "--contents", paintings]
    with files.reserved(64, 8, False):
        code, _, err = command("finetune", *arguments, "--out", tmp_path, "--overwrite")
    assert (code, "is being trained by another run" in err) == (1, True)


def test_painter_paints_in_the_palette_of_the_runtime(base, painter):
    palette = Palette(*(part.numpy() for part in painter.palette), painter.share)
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 3
    matched = painter.match(latent)
    edges = torch.zeros(2, 3, 64, 64)
    schedule = TimestepSchedule.build(base.config.noise, 12, 0.6, 10)
    step = schedule.steps[2]
    with torch.no_grad():
        x0 = painter.x0(latent, step.t, edges)
        own = painter.prompts[step.stage].expand(2, -1, -1, -1)
        null = base.null_context.expand(2, 3, -1, -1)
        time = torch.full((2,), step.t)
        residuals = base.control(latent, time, own, edges)
        guided = [base.eps(latent, time, context, residuals=residuals).numpy() for context in (null, own)]
    level = schedule.noise.level(step.t)
    for row in range(2):
        np.testing.assert_allclose(matched[row], palette.match(latent[row].numpy()), rtol=1e-4, atol=1e-5)
        eps = guided[0][row] + painter.guidance * (guided[1][row] - guided[0][row])
        limited = palette.limit(eps, latent[row].numpy(), level)
        np.testing.assert_allclose(x0[row], level.x0(latent[row].numpy(), limited), rtol=1e-3, atol=1e-3)


def test_gradient_through_the_sampler_is_that_of_finite_differences(contents, painter):
    prompts = painter.prompts.requires_grad_()
    pictures = random_pictures(contents.training, 2, 64, rng_for(0, RngStream.STEP, 0))

    def painted() -> torch.Tensor:
        return painter.paint(pictures, rng_for(0, RngStream.STEP, 1))

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(painted().shape, generator=generator)
    (weight * painted()).sum().backward()
    start = prompts.detach().clone()
    direction = torch.randn(start.shape, generator=generator)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            prompts.copy_(start + sign * 1e-2 * direction)
            ends.append((weight.double() * painted().double()).sum().item())
    slope = (prompts.grad.double() * direction.double()).sum().item()
    assert abs(slope) > 0.1
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(slope, rel=0.02)
