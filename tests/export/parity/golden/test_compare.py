"""`lsast-export golden` on sets recorded by the independent sampler of tests/oracles, and by the released code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import released_lsast
from golden_sets import GoldenFiles, both_sets
from lsast_engines.errors import ExportError, LsastError
from lsast_export.cli.golden import golden_command
from lsast_export.parity.golden.compare import GoldenReport, check_golden
from lsast_export.parity.golden.golden_set import read_golden
from lsast_train.checkpoints.safe_unpickle import load_module_tensors

Tensors = dict[str, torch.Tensor]


def check(prefix: Path, backend: str = "torch") -> GoldenReport:
    return check_golden(read_golden(prefix), backend)


def past(prefix: Path) -> set[str]:
    """Names of the quantities that are past the tolerance."""
    return {name for name, error in check(prefix).errors.items() if error > 1e-4}


def lsast_golden(*arguments: object) -> Result:
    return CliRunner().invoke(golden_command, [str(argument) for argument in arguments])


# Each recipe differs from the others in architecture, schedule, guidance and shape.
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "31 points, all of them but one": {"steps": 30, "strength": 1.0, "size": (4, 4)},
    "wide steps": {"steps": 7, "strength": 0.9, "size": (4, 10), "tokens": 77},
    "four levels": {
        "channel_mult": (1, 1, 2, 3), "attending": (0, 1, 2), "num_heads": 8, "size": (8, 16), "steps": 50,
        "strength": 0.1, "guidance": 10.0,
    },
    "attention at fewer levels": {"channel_mult": (1, 2, 2), "attending": (1,), "size": (4, 8), "num_heads": 1},
    "attention at the deepest level": {"channel_mult": (1, 2), "attending": (0, 1), "num_heads": 16, "context_dim": 96},
    "two blocks, 64 wide": {"model_channels": 64, "num_res_blocks": 2, "channel_mult": (1, 1), "strength": 0.2},
    "one level": {"channel_mult": (1,), "size": (3, 5)},
    "three blocks": {"num_res_blocks": 3, "strength": 0.1},
    "unguided": {"guidance": 1.0, "strength": 0.7, "steps": 10},
    "little guidance": {"guidance": 0.5},
    "a batch": {"batch": 2, "seed": 3},
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_check_golden_in_torch_repeats_the_recording(record: Any, recipe: dict[str, Any]) -> None:
    report = check(record(**recipe))
    assert report.passed, report.errors
    assert max(report.errors.values()) < 3e-5
    guided = recipe.get("guidance") != 1.0
    levels, blocks = len(recipe.get("channel_mult", (1, 2))), recipe.get("num_res_blocks", 1)
    residuals = [f"control_residual_{index:02}" for index in range(levels * (blocks + 1) + 1)]
    eps = ["eps_cond", "free_eps_cond"] + (["eps_uncond", "free_eps_uncond"] if guided else [])
    expected = ["timesteps", "start_latent", *residuals, *eps, "free_latents", "final_latent"]
    assert sorted(report.errors) == sorted(expected)
    assert report.architecture["num_heads"] == recipe.get("num_heads", 4)
    assert report.notes == ()


@both_sets
def test_check_golden_of_a_released_run_passes(golden: GoldenFiles) -> None:
    report = check(golden.prefix)
    assert report.passed, report.errors
    assert {"train_loss", "train_gradient", "train_gradient_elsewhere", "control_residual_06"} <= report.errors.keys()
    assert report.errors["train_gradient_elsewhere"] == 0


def _assert_near(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()), msg=name)


@both_sets
def test_oracle_repeats_the_recording(golden: GoldenFiles) -> None:
    # On the released code's recording: without it, sets that the oracle writes prove nothing about that code.
    unet, control, recorded = (golden.tensors(part) for part in ("unet", "control", "io"))
    found = released_lsast.sample(recorded, unet, control, golden.heads, golden.steps, golden.strength, golden.guidance)
    for name, value in found.items():
        _assert_near(value, recorded[name].float(), name)
    for case in golden.training_cases():
        loss, index, gradient = released_lsast.training_step(
            unet, case["z"], case["noise"], int(case["t"]), case["contexts"], golden.heads
        )
        assert [index] == case["grad_index"].tolist()
        assert loss == pytest.approx(case["loss"].item(), rel=1e-5)
        _assert_near(gradient, case["grad"], "grad")
    made = golden.generator()
    state = {name.removeprefix("attention."): value for name, value in load_module_tensors(golden.checkpoint).items()}
    _assert_near(released_lsast.generator(state, made["initial"][0]), made["prompts"], "prompts")


def _exchange(name: str, other: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name], tensors[other] = tensors[other], tensors[name]

    return change


def _nudge(name: str, index: tuple[int, ...]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][index] += 3e-4 * tensors[name].abs().max()

    return change


def _scale_context(number: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors["contexts"][number] *= 1.5

    return change


# 20 steps, strength 0.3: t = 251 … 1, stages 2, 1, 0; contexts 0 to 4 are read.
CHANGES: dict[str, tuple[Callable[[Tensors], None], set[str]]] = {
    "halves exchanged": (_exchange("eps_cond", "eps_uncond"),
                         {"eps_cond", "eps_uncond", "free_eps_cond", "free_eps_uncond"}),
    "one value of one step": (_nudge("eps_uncond", (3, 1, 2, 2)), {"eps_uncond", "free_eps_uncond"}),
    "one residual": (_nudge("control_residual_02", (0, 1, 1, 1)), {"control_residual_02"}),
    "start": (_nudge("start_latent", (0, 0, 0, 0)), {"start_latent"}),
    "end": (_nudge("final_latent", (0, 3, 1, 1)), {"final_latent"}),
    "a context that is never read": (_scale_context(5), set()),
    # Of stage 2 alone: the decoder's context, so neither ControlNet nor the unconditional half sees it at first.
    "the last context that is read": (_scale_context(4),
                                      {"eps_cond", "free_eps_cond", "free_eps_uncond", "free_latents", "final_latent"}),
    # Of stage 0 alone: the encoder's, only at the end of the run.
    "the first context": (_scale_context(0),
                          {"eps_cond", "eps_uncond", "free_eps_cond", "free_eps_uncond", "free_latents",
                           "final_latent"}),
}  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_check_golden_names_what_differs(record: Any, change: Any, expected: set[str]) -> None:
    assert past(record(change=change)) == expected


def test_check_golden_finds_diffusers_start_noise(record: Any) -> None:
    # What diffusers' image-to-image does, and the released code does not (docs/method.md §4.4).
    from diffusers import DDIMScheduler

    def change(tensors: Tensors) -> None:
        scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear")
        t = tensors["timesteps"][:1]
        tensors["start_latent"] = scheduler.add_noise(tensors["z0"], tensors["noise"], t)

    assert past(record(change=change)) == {"start_latent"}


def test_read_golden_refuses_wrong_metadata(record: Any) -> None:
    with pytest.raises(
        ExportError,
        match=r"metadata steps: found 'many'.*\n.*guidance: found None.*\n.*num_heads: found '2.5'; .* whole",
    ):
        check(record(drop=("guidance",), says={"steps": "many", "num_heads": "2.5"}))
    with pytest.raises(ExportError, match=r"found 333; expected another number with ddim_lsast"):
        check(record(says={"steps": "333"}))


FAULTS: dict[str, tuple[Callable[[Tensors], Any], list[str]]] = {
    "missing": (lambda t: [t.pop(name) for name in ("noise", "eps_cond", "final_latent")],
                ["noise: missing", "eps_cond: missing", "final_latent: missing"]),
    "not finite": (lambda t: [t["z0"].fill_(float("nan")), t["hint"].fill_(float("inf"))],
                   ["hint holds NaN or infinite", "z0 holds NaN or infinite"]),
    "shapes": (lambda t: t.update(hint=t["hint"][..., 8:], start_latent=t["start_latent"][:, :2],
                                  eps_cond=t["eps_cond"][1:], unconditional=t["unconditional"][1:]),
               ["hint: found shape [1, 3, 64, 24]; expected [1, 3, 64, 32]", "start_latent: found shape [1, 2, 8, 4]",
                "eps_cond: found shape [5, 4, 8, 4]; expected [6, 4, 8, 4]",
                "unconditional: found shape [4, 24]; expected [5, 24]"]),
    "contexts": (lambda t: t.update(contexts=t["contexts"][:4]),
                 ["contexts: found shape [4, 5, 24]; expected [5, 5, 24]"]),
    "half a set": (lambda t: t.pop("eps_uncond"), ["eps_uncond: missing"]),
    "context width": (lambda t: t.update(contexts=t["contexts"][..., 8:], unconditional=t["unconditional"][..., 8:]),
                      ["contexts: found 16 channels; expected 24"]),
    "residuals": (lambda t: t.pop("control_residual_04"), ["control_residual_…: found 4; expected 5"]),
}  # fmt: skip


@pytest.mark.parametrize(("change", "messages"), FAULTS.values(), ids=FAULTS)
def test_read_golden_lists_all_faults(record: Any, change: Any, messages: list[str]) -> None:
    with pytest.raises(ExportError) as caught:
        check(record(change=change))
    assert [message for message in messages if message not in str(caught.value)] == []
    assert len(str(caught.value).splitlines()) == 1 + len(messages)


def test_read_golden_lists_missing_and_damaged_files(record: Any, tmp_path: Path) -> None:
    prefix = record()
    Path(f"{prefix}_unet.safetensors").unlink()
    Path(f"{prefix}_io.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ExportError, match=r"set_unet.safetensors: missing\n .*set_io.safetensors: cannot be read"):
        read_golden(prefix)


def test_check_golden_refuses_networks_of_two_bases(record: Any, tmp_path: Path) -> None:
    prefix = record(context_dim=16)
    control = Path(f"{prefix}_control.safetensors").read_bytes()
    record()
    Path(f"{prefix}_control.safetensors").write_bytes(control)
    with pytest.raises(LsastError, match="found cross_attention_dim 16; expected 24"):
        check(prefix)


def test_golden_command_prints_errors_and_fails_past_the_tolerance(record: Any) -> None:
    prefix = record()
    passed = lsast_golden(prefix)
    assert passed.exit_code == 0, passed.output
    names = [line.split()[0] for line in passed.stdout.splitlines()]
    assert names[:3] == ["timesteps", "start_latent", "control_residual_00"]
    assert {"eps_cond", "eps_uncond", "final_latent"} < set(names)
    assert all(0 <= float(line.split()[1]) < 1e-4 for line in passed.stdout.splitlines())

    failed = lsast_golden(prefix, "--tolerance", "1e-9")
    assert failed.exit_code == 1
    assert "final_latent: found a relative error of" in failed.stderr
    assert "past the tolerance" in failed.stdout


def test_golden_command_prints_one_json_object(record: Any) -> None:
    result = lsast_golden(record(change=_nudge("final_latent", (0, 0, 0, 0))), "--json")
    report = json.loads(result.stdout)
    assert (report["passed"], report["backend"], report["tolerance"], result.exit_code) == (False, "torch", 1e-4, 1)
    assert report["errors"]["final_latent"] == report["largest"] == pytest.approx(3e-4, rel=0.02)
    assert report["errors"]["eps_cond"] < 1e-4


@pytest.mark.parametrize("arguments", [["--backend", "tensorflow"], ["--tolerance", "nan"], ["--tolerance", "0"]])
def test_golden_command_with_wrong_usage_exits_2(tmp_path: Path, arguments: list[str]) -> None:
    assert lsast_golden(tmp_path / "none", *arguments).exit_code == 2
