from __future__ import annotations

from typing import Any

import torch

from lsast_engines.bundle.style import Style
from lsast_engines.diffusion import NoiseSchedule, TimestepSchedule
from lsast_train.base.base import Base
from lsast_train.distillation.student import null_rows
from lsast_train.distillation.teacher import Teacher, jitter_timesteps, read_contents
from lsast_train.options import DistillOptions
from lsast_train.paintings import PaintingDataset


def _guided(base: Base, prompts: torch.Tensor, latent: torch.Tensor, t: int, edges: torch.Tensor, g: float) -> Any:
    """ε of two whole passes with contexts, the residuals those of the style; and that of the style alone."""
    contexts = prompts[t // 100].expand(len(latent), -1, -1, -1)
    null = base.null_context.expand_as(contexts)
    time = torch.full((len(latent),), t)
    with torch.no_grad():
        plain = base.eps(latent, time, contexts, edges)
        return base.eps(latent, time, null, residuals=base.control(latent, time, contexts, edges)) * (
            1 - g
        ) + g * plain, plain


def test_teacher_targets_are_the_guided_noise_of_two_passes(
    base: Base, source: Style, prompts: torch.Tensor, collection: PaintingDataset
) -> None:
    options = DistillOptions(guidance=4.0, teacher_steps=4, size=64)
    content = read_contents(base, collection.training, 4, 64, 0, 0)
    samples = Teacher(base, source, null_rows(base), options).samples(content, 0, noised=2)
    assert sorted(set(samples.stage.tolist())) == list(range(10))
    assert torch.equal(samples.stage, samples.timestep // 100)
    for index in range(0, len(samples.stage), 5):
        row, edges = slice(index, index + 1), content.edges[samples.picture[index : index + 1]]
        guided, plain = _guided(base, prompts, samples.latent[row], int(samples.timestep[index]), edges, 4.0)
        torch.testing.assert_close(samples.target[row], guided, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(samples.unguided[row], plain, rtol=1e-3, atol=1e-4)


def test_jitter_timesteps_lowers_all_timesteps_by_less_than_a_stride() -> None:
    schedule = TimestepSchedule.build(NoiseSchedule(), 12, 1.0, 10, "dpmpp2m")
    assert jitter_timesteps(schedule, 0.0, 10).steps == schedule.steps
    moved = jitter_timesteps(schedule, 0.5, 10)
    assert [a.t - b.t for a, b in zip(schedule.steps, moved.steps, strict=True)] == [38] * 12
    assert moved.start_t == schedule.start_t - 38
    assert all(step.stage == step.t // 100 for step in moved.steps)
    assert jitter_timesteps(schedule, 0.999, 10).steps[-1].t > 0
