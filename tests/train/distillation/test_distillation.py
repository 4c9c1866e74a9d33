from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lsast_engines.bundle.style import Style, StyleFile
from lsast_engines.diffusion.noise_schedule import NoiseSchedule
from lsast_engines.diffusion.solvers import make_solver
from lsast_engines.diffusion.timesteps import TimestepSchedule
from lsast_engines.errors import StyleError, TrainingError, UsageError
from lsast_train.__main__ import main
from lsast_train.base.baked import BakedBase
from lsast_train.base.base import Base
from lsast_train.base.kv_packing import kv_layouts
from lsast_train.base.lazy_base import save_base
from lsast_train.distillation.distillation import Distillation
from lsast_train.distillation.options import DistillOptions
from lsast_train.distillation.result import distilled_meta
from lsast_train.distillation.source_style import SourceStyle, find_style, null_rows, read_source, recover_prompts
from lsast_train.distillation.teacher import jitter_timesteps, solve_eps, subdivide
from lsast_train.mini.architecture import MiniConfig, build_mini
from lsast_train.paintings import PaintingDataset
from lsast_train.prompts.prompt_file import Prompts, load_prompts, save_prompts
from lsast_train.training.signals import InterruptionError

BRIEF = DistillOptions(guidance=4.0, pictures=4, noised=2, teacher_steps=4, steps=80, batch=4, lr=0.1, size=64,
                      evaluate_every=40)  # fmt: skip


def _prompts(base: Base, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return base.null_context + torch.randn(10, 3, base.config.tokens, base.context_dim, generator=generator)


def _source(base: Base, kind: str = "kv", meta: dict[str, str] | None = None) -> SourceStyle:
    prompts = _prompts(base)
    with torch.no_grad():
        kv_unet, kv_control = (layout.project(prompts) for layout in kv_layouts(base))
    return SourceStyle("hand", kv_unet, kv_control, prompts if kind == "prompts" else None, meta or {})


def _interrupt_at(step: int) -> Callable[[int, float], None]:
    def on_step(now: int, _: float) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def _guided(base: Base, prompts: torch.Tensor, latent: torch.Tensor, t: int, edges: torch.Tensor, g: float) -> Any:
    """ε of two whole passes through unpatched networks with contexts, the residuals those of the style."""
    contexts = prompts[t // 100].expand(len(latent), -1, -1, -1)
    null = base.null_context.expand_as(contexts)
    time = torch.full((len(latent),), t)
    with torch.no_grad():
        plain = base.eps(latent, time, contexts, edges)
        return base.eps(latent, time, null, edges, control_contexts=contexts) * (1 - g) + g * plain, plain


@pytest.mark.parametrize("kind", ["kv", "prompts"])
def test_one_pass_comes_nearer_to_two(base: Base, collection: PaintingDataset, tmp_path: Path, kind: Any) -> None:
    before = {key: value.clone() for key, value in base.unet.state_dict().items()}
    source = _source(base, kind, {"licence": "CC0", "defaults": json.dumps({"guidance": 4.0, "control": 0.8})})
    run = Distillation(base, source, collection, replace(BRIEF, kind=kind), "hand-g4", tmp_path)
    outcome = run.run()
    unguided, start, _, _ = (run.curve.relative(evaluation) for evaluation in run.curve.evaluations)
    assert (unguided, outcome.best_step) == (1.0, 80)
    assert outcome.relative_loss < min(0.79, 0.97 * start)
    assert all(torch.equal(value, before[key]) for key, value in base.unet.state_dict().items())
    # The networks serve contexts again, and the errors that are told are those of whole passes.
    if kind == "kv":
        file = StyleFile(outcome.file)
        assert file.distilled_guidance == 4.0
        assert file.defaults == {"control_scale": 0.8}
        assert file.meta["licence"] == "CC0"
        kv = torch.from_numpy(file.load().kv_unet)
        np.testing.assert_allclose(file.load().kv_control, source.kv_control.numpy(), atol=2e-3)
    else:
        prompts = load_prompts(outcome.file, base)
        assert prompts.meta["guidance_baked"] == "4"
        with torch.no_grad():
            kv = kv_layouts(base)[0].project(prompts.prompts)
    content, states = run.val_set
    squares = np.zeros((2, 10))
    baked, control_layout = BakedBase(base), kv_layouts(base)[1]
    for index in range(len(states.stage)):
        row, stage = slice(index, index + 1), int(states.stage[index])
        latent, time, hint = states.latent[row], states.timestep[row], content.hints[states.picture[row]]
        control = source.kv_control[stage] if kind == "kv" else control_layout.project(prompts.prompts)[stage]
        with torch.no_grad():
            found = baked.predict(latent, time, (kv[stage], control), hint, 1.0)
        for side, eps in enumerate((found, states.unguided[row])):
            squares[side, stage] += (eps - states.target[row]).square().sum().item()
    assert np.sqrt(squares[0] / squares[1]).mean() == pytest.approx(outcome.relative_loss, abs=0.01)
    evaluations = json.loads(outcome.curve.read_text())["evaluations"]
    assert evaluations[0]["relative_held_out"] == 1.0
    assert outcome.curve.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_targets_are_the_guided_noise_of_whole_passes(base: Base, collection: PaintingDataset, tmp_path: Path) -> None:
    run = Distillation(base, _source(base), collection, BRIEF, "hand-g4", tmp_path)
    run.prepare()
    content, states = run.train_set
    assert sorted(set(states.stage.tolist())) == list(range(10))
    assert torch.equal(states.stage, states.timestep // 100)
    # Edges are not kept; flat pictures have none, and the hint features of none are the same everywhere.
    hints = BakedBase(base).hints(torch.zeros(1, 3, 64, 64))
    flat = [i for i in range(len(states.stage)) if torch.equal(content.hints[states.picture[i]], hints[0])]
    assert flat
    for index in flat[::5]:
        t = int(states.timestep[index])
        edges = torch.zeros(1, 3, 64, 64)
        guided, plain = _guided(base, _prompts(base), states.latent[index : index + 1], t, edges, 4.0)
        torch.testing.assert_close(states.target[index : index + 1], guided, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(states.unguided[index : index + 1], plain, rtol=1e-3, atol=1e-4)


def test_of_a_linear_base_guidance_is_found_exactly(
    base: Base, collection: PaintingDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ε linear in keys and values: null + g (style - null) is the answer, and g = 4 is among the starts."""
    width = kv_layouts(base)[0].width
    mix = torch.randn(width, 4, generator=torch.Generator().manual_seed(3)) / width**0.5

    def eps(_: Any, latent: torch.Tensor, __: Any, kv: torch.Tensor, ___: Any) -> torch.Tensor:
        return 0.3 * latent + (kv.mean(0) @ mix)[:, None, None]

    monkeypatch.setattr("lsast_train.base.baked.BakedBase.eps", eps)
    source = _source(base)
    outcome = Distillation(base, source, collection, replace(BRIEF, steps=1), "hand-g4", tmp_path).run()
    assert (outcome.best_step, outcome.relative_loss < 1e-4) == (0, True)
    null = null_rows(base)
    expected = null + 4 * (source.kv_unet - null)
    np.testing.assert_allclose(StyleFile(outcome.file).load().kv_unet, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp2m", "unipc"])
def test_the_students_solver_lands_where_the_teacher_went(solver: str) -> None:
    noise = NoiseSchedule()
    coarse = TimestepSchedule.build(noise, 6, 0.9, 10, solver)
    fine, marks = subdivide(coarse, 5, 10)
    assert [fine.steps[mark].t for mark in marks] == [step.t for step in coarse.steps]
    assert np.diff(marks).tolist() == [5] * (len(marks) - 1)
    assert all(step.t > step.t_prev for step in fine.steps)
    rng = np.random.default_rng(0)
    way = [rng.standard_normal((2, 4, 3, 3)) for _ in range(len(coarse.steps) + 1)]
    student = make_solver(solver, noise, coarse)
    found = [solve_eps(student, i, way[i], way[i + 1]) for i in range(len(coarse.steps))]
    replay, x = make_solver(solver, noise, coarse), way[0]
    for index, eps in enumerate(found):
        x = replay.step(eps, index, x)
        np.testing.assert_allclose(x, way[index + 1], rtol=1e-6, atol=1e-6)


def test_few_steps_learn_from_many(
    base: Base, collection: PaintingDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = replace(BRIEF, student_steps=4, teacher_steps=12, strength=0.9)
    source = _source(base, meta={"defaults": json.dumps({"guidance": 4.0, "steps": 11, "control": 0.5})})
    run = Distillation(base, source, collection, options, "hand-g4-s4", tmp_path)
    outcome = run.run()
    times = [step.t for step in TimestepSchedule.build(NoiseSchedule(), 4, 0.9, 10, "dpmpp2m").steps]
    assert sorted(set(run.train_set[1].timestep.tolist())) == sorted(times)
    assert run.stages == sorted({t // 100 for t in times})
    assert outcome.relative_loss < 0.9
    file = StyleFile(outcome.file)
    assert file.defaults == {"steps": 4, "strength": 0.9, "solver": "dpmpp2m", "control_scale": 0.5}
    found, left = file.load().kv_unet, sorted(set(range(10)) - set(run.stages))
    assert f"stages {', '.join(map(str, left))} were not painted and stay unguided" in caplog.text
    np.testing.assert_allclose(found[left], source.kv_unet.numpy()[left], atol=2e-3)
    assert json.loads(outcome.curve.read_text())["stages"] == run.stages


def test_a_resumed_run_is_the_uninterrupted_one(
    collection: PaintingDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(BRIEF, steps=8, evaluate_every=4, pictures=2, noised=1, teacher_steps=2)

    def make(folder: str, **how: Any) -> Distillation:
        fresh = build_mini(MiniConfig.tiny())
        return Distillation(fresh, _source(fresh), collection, options, "hand-g4", tmp_path / folder, **how)

    straight = make("straight").run()
    with pytest.raises(InterruptionError, match=r"after step 6; .* --resume") as caught:
        make("parts", on_step=_interrupt_at(6)).run()
    assert caught.value.exit_code == 130
    with pytest.raises(TrainingError, match="unfinished run"):
        make("parts")
    assert {path.suffixes[-2] for path in (tmp_path / "parts").glob("*.safetensors")} == {".checkpoint", ".teacher"}
    other = build_mini(MiniConfig.tiny())
    changed = replace(options, guidance=5.0)
    with pytest.raises(TrainingError, match=r"another run(.|\n)*guidance: found 4.0 in the checkpoint, 5.0 now"):
        Distillation(other, _source(other), collection, changed, "hand-g4", tmp_path / "parts", True).run()
    # What the teacher painted is not painted again.
    with monkeypatch.context() as patch:
        patch.setattr("lsast_train.distillation.teacher.Teacher.samples", None)
        resumed = make("parts", resume=True).run()
    assert resumed.file.read_bytes() == straight.file.read_bytes()
    assert resumed.curve.read_text() == straight.curve.read_text()
    assert [path.name for path in (tmp_path / "parts").glob("*.safetensors")] == ["hand-g4.safetensors"]


def test_prompts_are_recovered_from_keys_and_values(base: Base) -> None:
    source, layouts = _source(base, "prompts"), kv_layouts(base)
    assert source.prompts is not None
    half = [kv.half().float() for kv in (source.kv_unet, source.kv_control)]
    found = recover_prompts(layouts, *half, "hand")
    torch.testing.assert_close(found, source.prompts, rtol=0.02, atol=0.02)
    with pytest.raises(StyleError, match=r"no prompts give its keys and values .*kind kv"):
        recover_prompts(layouts, half[0] + 0.1 * torch.randn_like(half[0]), half[1], "hand")


def test_a_style_is_found_by_file_bundle_and_run_and_read_as_either(base: Base, tmp_path: Path) -> None:
    source = _source(base)
    shape = (base.fingerprint, 10, base.config.tokens)
    file = tmp_path / "hand.safetensors"
    Style("hand", *shape, source.kv_unet.numpy(), source.kv_control.numpy(), {"licence": "CC0"}).save(file)
    prompts = _prompts(base)
    run = tmp_path / "runs" / "hand" / "hand.prompts.safetensors"
    matrices = prompts.flatten(0, 1)
    save_prompts(Prompts("hand", base.fingerprint, "step+layer", "direct", "strided", "all", prompts, matrices), run)
    assert find_style(str(file), None, "prompts") == file
    assert find_style("hand", None, "kv").resolve() == run
    with pytest.raises(StyleError, match="found no style 'nobody'"):
        find_style("nobody", None, "kv")
    left, right = read_source(file, base, "prompts"), read_source(run, base, "prompts")
    assert left.prompts is not None
    assert right.prompts is not None
    torch.testing.assert_close(left.prompts, right.prompts, rtol=0.02, atol=0.02)
    torch.testing.assert_close(left.kv_unet, right.kv_unet, rtol=2e-3, atol=2e-3)
    assert left.meta["licence"] == "CC0"
    Style("other", "ab" * 32, *shape[1:], source.kv_unet.numpy(), source.kv_control.numpy()).save(file)
    with pytest.raises(StyleError, match="was learned on base abab"):
        read_source(file, base, "kv")
    baked = {"guidance_baked": "7"}
    Style("baked", *shape, source.kv_unet.numpy(), source.kv_control.numpy(), baked).save(file)
    with pytest.raises(StyleError, match="guidance 7 baked in already"):
        read_source(file, base, "kv")


def test_what_cannot_be_meant_is_told_at_once(base: Base, collection: PaintingDataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        DistillOptions(guidance=1.0, lr=0.0, batch=0, solver="euler", kind="lora")  # type: ignore[arg-type]
    told = {line.split(":")[0].strip(" -") for line in str(caught.value).splitlines()[1:]}
    assert told == {"kind", "solver", "batch", "lr", "guidance"}
    with pytest.raises(UsageError, match="at least as many"):
        DistillOptions(guidance=7.0, student_steps=20)
    with pytest.raises(UsageError, match=r"(?s)name: .*size: found 80"):
        Distillation(base, _source(base), collection, replace(BRIEF, size=80), "a/b", tmp_path)
    with pytest.raises(UsageError, match="read it for prompts"):
        Distillation(base, _source(base), collection, replace(BRIEF, kind="prompts"), "hand", tmp_path)
    with pytest.raises(TrainingError, match=r"found no checkpoint .* start without --resume"):
        Distillation(base, _source(base), collection, BRIEF, "hand", tmp_path, resume=True)


def test_shifted_runs_meet_other_timesteps() -> None:
    schedule = TimestepSchedule.build(NoiseSchedule(), 12, 1.0, 10, "dpmpp2m")
    assert jitter_timesteps(schedule, 0.0, 10).steps == schedule.steps
    moved = jitter_timesteps(schedule, 0.5, 10)
    assert [a.t - b.t for a, b in zip(schedule.steps, moved.steps, strict=True)] == [38] * 12
    assert moved.start_t == schedule.start_t - 38
    assert all(step.stage == step.t // 100 for step in moved.steps)
    assert jitter_timesteps(schedule, 0.999, 10).steps[-1].t > 0


def test_facts_of_the_original_are_kept_but_its_guidance() -> None:
    kv = torch.zeros(10, 2, 4)
    source = SourceStyle("hand", kv, kv, None, {"works": "7", "defaults": json.dumps({"guidance": 7.0})})
    meta = distilled_meta(source, BRIEF, 0.25, 30, "ab")
    assert (meta["works"], meta["guidance_baked"], meta["distilled_from"]) == ("7", "4", "hand")
    assert "defaults" not in meta


def test_the_command_distils_and_says_where(
    base: Base, paintings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_base(base, tmp_path / "base")
    source = _source(base)
    fingerprint = json.loads((tmp_path / "base" / "base.json").read_text())["fingerprint"]
    shape = (fingerprint, 10, base.config.tokens)
    Style("hand", *shape, source.kv_unet.numpy(), source.kv_control.numpy()).save(tmp_path / "hand.safetensors")
    arguments = ["distil", "--style", tmp_path / "hand.safetensors", "--images", paintings, "--base", tmp_path / "base",
                 "--guidance", "3", "--size", "64", "--pictures", "2", "--noised", "0", "--teacher-steps", "10",
                 "--steps", "4", "--batch", "2", "--json"]  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert caught.value.code == 0, err
    told = json.loads(out)
    assert Path(told["file"]) == Path("runs/hand-g3/hand-g3.safetensors")
    assert StyleFile(Path(told["file"])).distilled_guidance == 3.0
    assert "is left" in err
    with pytest.raises(SystemExit) as caught:
        main([*[str(argument) for argument in arguments[:-1]], "--guidance", "1"])
    assert caught.value.code == 2
    assert "takes one pass already" in capsys.readouterr().err
