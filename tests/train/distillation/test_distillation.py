"""Guidance distillation: teacher, student and the style that is distilled."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from benchmarks.mini.training.mini_base import MiniConfig, build_mini
from lsast_engines.bundle.style import Style, StyleFile
from lsast_engines.diffusion import SOLVERS, NoiseSchedule, TimestepSchedule
from lsast_engines.errors import StyleError, UsageError
from lsast_train.base.attention import packed_kv, project_contexts
from lsast_train.base.base import Base
from lsast_train.base.lazy_base import save_base
from lsast_train.distillation.distillation import Distillation
from lsast_train.distillation.student import null_rows, read_style
from lsast_train.distillation.teacher import Teacher, jitter_timesteps, read_contents
from lsast_train.options import DistillOptions, Solver
from lsast_train.prompts.prompt_file import Prompts, save_prompts
from lsast_train.training.run import RunFiles

from ..conftest import weights

BRIEF = DistillOptions(guidance=4.0, pictures=4, noised=2, teacher_steps=4, steps=80, batch=4, lr=0.1, size=64,
                      evaluate_every=40)  # fmt: skip


def test_distillation_brings_one_pass_nearer_to_two(base, source, collection, tmp_path):
    before = weights(base)
    source.meta.update({"licence": "CC0", "defaults": json.dumps({"guidance": 4.0, "control": 0.8})})
    run = Distillation(base, source, collection, BRIEF, "hand-g4", tmp_path)
    outcome = run.run()
    unguided, start, _, _ = (run.curve.relative(evaluation) for evaluation in run.curve.evaluations)
    assert (unguided, outcome.best_step) == (1.0, 80)
    assert outcome.relative_loss < min(0.79, 0.97 * start)
    assert all(torch.equal(value, before[key]) for key, value in weights(base).items())
    file = StyleFile(outcome.file)
    # The metadata is that of the original, but that its guidance is baked in.
    assert (file.distilled_guidance, file.defaults) == (4.0, {"control_scale": 0.8})
    assert (file.meta["licence"], file.meta["distilled_from"]) == ("CC0", "hand")
    style = file.load()
    np.testing.assert_allclose(style.kv_control, source.kv_control, atol=2e-3)
    # The error that is reported is that of whole passes with the file's keys and values.
    states = run.val_set
    squares = np.zeros((2, 10))
    for index in range(len(states.stage)):
        row, stage = slice(index, index + 1), int(states.stage[index])
        latent, time, edges = states.latent[row], states.timestep[row], states.edges[states.picture[row]]
        unet, control = (packed_kv(torch.from_numpy(kv[stage])[None]) for kv in (style.kv_unet, source.kv_control))
        with torch.no_grad():
            found = base.eps(latent, time, unet, residuals=base.control(latent, time, control, edges))
        for side, eps in enumerate((found, states.unguided[row])):
            squares[side, stage] += (eps - states.target[row]).square().sum().item()
    assert np.sqrt(squares[0] / squares[1]).mean() == pytest.approx(outcome.relative_loss, abs=0.01)
    evaluations = json.loads(outcome.curve.read_text())["evaluations"]
    assert evaluations[0]["relative_held_out"] == 1.0


def test_distillation_on_a_linear_base_finds_guidance_exactly(base, source, collection, tmp_path, monkeypatch):
    """ε linear in keys and values: null + g (style - null) is the answer, and g = 4 is among the initial values."""
    width = source.kv_unet.shape[2]
    mix = torch.randn(width, 4, generator=torch.Generator().manual_seed(3)) / width**0.5

    def linear(_: Base, latent: torch.Tensor, __: Any, kv: Any, **___: Any) -> torch.Tensor:
        return 0.3 * latent + (kv["kv"].mean(1) @ mix)[:, :, None, None]

    monkeypatch.setattr(Base, "eps", linear)
    outcome = Distillation(base, source, collection, replace(BRIEF, steps=1), "hand-g4", tmp_path).run()
    assert (outcome.best_step, outcome.relative_loss < 1e-4) == (0, True)
    null = null_rows(base).numpy()
    expected = null + 4 * (source.kv_unet - null)
    np.testing.assert_allclose(StyleFile(outcome.file).load().kv_unet, expected, rtol=2e-3, atol=2e-3)


def test_stages_that_the_teacher_does_not_paint_stay_unguided(base, source, collection, tmp_path, caplog):
    options = replace(BRIEF, strength=0.5, noised=0, steps=10)
    run = Distillation(base, source, collection, options, "hand-g4", tmp_path)
    outcome = run.run()
    left = sorted(set(range(10)) - set(run.stages))
    assert {5, 6, 7, 8, 9} <= set(left)
    assert f"stages {', '.join(map(str, left))} were not painted and stay unguided" in caplog.text
    found = StyleFile(outcome.file).load().kv_unet
    np.testing.assert_allclose(found[left], source.kv_unet[left], atol=2e-3)
    assert json.loads(outcome.curve.read_text())["stages"] == run.stages


def test_resumed_distillation_equals_the_uninterrupted_one(source, collection, tmp_path, stop_and_resume):
    # Few stages, so that the steps after the resume come back to some: each has its own moments in the optimizer.
    options = replace(BRIEF, steps=6, evaluate_every=3, pictures=2, noised=0, teacher_steps=2, strength=0.3)

    def make(folder: str, resume: bool = False, **changes: Any) -> Distillation:
        base = build_mini(MiniConfig.tiny())
        chosen = replace(options, **changes)
        return Distillation(base, source, collection, chosen, "hand-g4", tmp_path / folder, resume)

    stop_and_resume(make, 4, guidance=5.0)


def test_invalid_options_are_all_reported(base, source, collection, tmp_path):
    assert get_args(Solver) == tuple(SOLVERS)
    with pytest.raises(UsageError) as caught:
        DistillOptions(guidance=1.0, lr=0.0, batch=0, solver="euler", strength=1.5)
    faults = {line.split(":")[0].strip(" -") for line in str(caught.value).splitlines()[1:]}
    assert faults == {"strength", "solver", "batch", "lr", "guidance"}
    with pytest.raises(UsageError, match=r"(?s)name: .*size: found 80"):
        Distillation(base, source, collection, replace(BRIEF, size=80), "a/b", tmp_path)


def test_distill_command_prints_the_style_file(base, source, paintings, tmp_path, command):
    replace(source, base=save_base(base, tmp_path / "base")).save(tmp_path / "hand.safetensors")
    # The command's and an option's old names work, too.
    arguments = ["distil", "--style", tmp_path / "hand.safetensors", "--images", paintings, "--base", tmp_path / "base",
                 "--guidance", "3", "--size", "64", "--pictures", "2", "--noised", "0", "--teacher-steps", "4",
                 "--steps", "4", "--batch", "2", "--precision", "fp32", "--json"]  # fmt: skip
    code, out, err = command(*arguments)
    assert code == 0, err
    result = json.loads(out)
    assert Path(result["file"]) == Path("runs/hand-g3/hand-g3.safetensors")
    assert StyleFile(Path(result["file"])).distilled_guidance == 3.0
    assert "is left" in err
    with RunFiles(Path("runs/hand-g3"), "hand-g3", prompts=False).reserved(64, 8, False):
        assert "is being trained by another run" in command(*arguments, "--overwrite")[2]
    assert command(*arguments, "--overwrite", "--quiet")[::2] == (0, "")
    code, _, err = command(*arguments[:-1], "--guidance", "1")
    assert (code, "takes one pass already" in err) == (2, True)


@pytest.fixture
def prompts(base: Base) -> torch.Tensor:
    """[10, 3, tokens, dim]: random prompts."""
    generator = torch.Generator().manual_seed(0)
    return base.null_context + torch.randn(10, 3, base.config.tokens, base.context_dim, generator=generator)


@pytest.fixture
def source(base: Base, prompts: torch.Tensor) -> Style:
    """The style of `prompts`."""
    with torch.no_grad():
        kv_unet, kv_control = (project_contexts(net, prompts).numpy() for net in (base.unet, base.controlnet))
    return Style("hand", base.fingerprint, 10, base.config.tokens, kv_unet, kv_control)


def test_teacher_targets_are_the_guided_noise_of_two_passes(base, source, prompts, collection):
    options = DistillOptions(guidance=4.0, teacher_steps=4, size=64)
    content = read_contents(base, collection.training, 4, 64, 0, 0)
    samples = Teacher(base, source, null_rows(base), options).samples(content, 0, noised=2)
    assert sorted(set(samples.stage.tolist())) == list(range(10))
    assert torch.equal(samples.stage, samples.timestep // 100)
    for index in range(0, len(samples.stage), 5):
        row = slice(index, index + 1)
        latent, time, edges = samples.latent[row], samples.timestep[row], content.edges[samples.picture[row]]
        contexts = prompts[time // 100]
        with torch.no_grad():
            residuals = base.control(latent, time, contexts, edges)  # of the style in both passes
            plain = base.eps(latent, time, contexts, edges)
            null = base.eps(latent, time, base.null_context.expand_as(contexts), residuals=residuals)
        torch.testing.assert_close(samples.target[row], null + 4 * (plain - null), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(samples.unguided[row], plain, rtol=1e-3, atol=1e-4)


def test_jitter_timesteps_lowers_all_timesteps_by_less_than_a_stride():
    schedule = TimestepSchedule.build(NoiseSchedule(), 12, 1.0, 10, "dpmpp2m")
    assert jitter_timesteps(schedule, 0.0, 10).steps == schedule.steps
    moved = jitter_timesteps(schedule, 0.5, 10)
    assert [a.t - b.t for a, b in zip(schedule.steps, moved.steps, strict=True)] == [38] * 12
    assert moved.start_t == schedule.start_t - 38
    assert all(step.stage == step.t // 100 for step in moved.steps)
    assert jitter_timesteps(schedule, 0.999, 10).steps[-1].t > 0


def test_read_style_of_a_style_file_and_of_a_run_gives_the_same_keys_and_values(base, source, prompts, tmp_path):
    file, run = tmp_path / "hand.safetensors", tmp_path / "runs" / "red" / "red.prompts.safetensors"
    replace(source, meta={"licence": "CC0"}).save(file)
    save_prompts(Prompts("red", base.fingerprint, "step+layer", "direct", "strided", "all", prompts), run)
    left, right = read_style(str(file), base), read_style("red", base)
    np.testing.assert_allclose(left.kv_unet, right.kv_unet, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(left.kv_control, right.kv_control, rtol=2e-3, atol=2e-3)
    assert (left.meta["licence"], right.name, right.meta["variant"]) == ("CC0", "red", "step+layer")


def test_read_style_refuses_another_base_baked_guidance_and_unknown_names(base, source, tmp_path):
    file = tmp_path / "hand.safetensors"
    for changes, message in (
        ({"base": "ab" * 32}, "was learned on base abab"),
        ({"meta": {"guidance_baked": "7"}}, "distilled guidance 7 already"),
    ):
        replace(source, **changes).save(file)
        with pytest.raises(StyleError, match=message):
            read_style(str(file), base)
    with pytest.raises(StyleError, match=r"no prompts at nobody or runs/nobody/nobody\.prompts.*the base: it has none"):
        read_style("nobody", base)
