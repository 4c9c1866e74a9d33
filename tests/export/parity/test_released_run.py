"""Sampling with a base in CompVis naming repeats what the released algorithm computed: in torch, and with the exported
graphs. The recordings are those of tests/data, of the released code, and of the independent sampler in tests/oracles.

Every step is computed from the recorded latent, and (``free_…``) from the latent that our own run has reached.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import released_lsast
from golden_sets import Recording, both_sets, record
from lsast_engines.backends.registry import available_backends, open_engine
from lsast_engines.bundle.graph_spec import CONTROLNET, CONTROLNET_COND, DENOISER, graph_specs, split_specs
from lsast_engines.diffusion import NoiseSchedule, TimestepSchedule, guide, make_solver
from lsast_export.graphs.external_weights import save_graph
from lsast_export.graphs.modules import geometry, unet_split
from lsast_export.graphs.trace import trace_graphs
from lsast_export.parity.parity import relative_error
from lsast_export.styles.bake import KVProjector
from lsast_train.base.base import Base, BaseConfig
from lsast_train.checkpoints.safe_unpickle import load_module_tensors
from lsast_train.checkpoints.single_file import controlnet_weights, unet_weights

BACKENDS = sorted(available_backends())
Denoiser = Callable[[torch.Tensor, int, int], tuple[np.ndarray, list[np.ndarray]]]
"""Latent [B, 4, h, w], timestep and stage → eps [G, B, 4, h, w] and ControlNet's residuals, the middle's last."""


def base_of(run: Recording) -> Base:
    unet = unet_weights(run.unet, run.heads).build()
    tokens = len(run.io["unconditional"])
    multiple = 8 * 2 ** (len(unet.config.block_out_channels) - 1)
    config = BaseConfig("released", "sd15", "epsilon", tokens, 512, 0.18215, multiple=multiple)
    controlnet = controlnet_weights(run.control, run.heads).build()
    return Base(config, "0" * 64, unet, controlnet, nn.Identity(), run.io["unconditional"])


def contexts_of(run: Recording, stage: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Contexts [B, 3, T, dim] of ControlNet, and of each row of the U-Net: number s + l for group l (docs/method.md
    §1.4); at guidance 1 the U-Net's are 0, 1 and 2 in every stage (§8.6)."""
    style, first = (run.io["contexts"][s : s + 3].expand(len(run.io["z0"]), -1, -1, -1) for s in (stage, 0))
    return style, [first] if run.guidance == 1 else [run.io["unconditional"].expand_as(style), style]


def torch_denoiser(run: Recording) -> Denoiser:
    base = base_of(run)

    @torch.no_grad()
    def denoise(latent: torch.Tensor, t: int, stage: int) -> tuple[np.ndarray, list[np.ndarray]]:
        style, rows = contexts_of(run, stage)
        times = torch.full((len(latent),), t)
        control = base.control(latent, times, style, run.io["hint"])
        eps = torch.stack([base.eps(latent, times, contexts, residuals=control) for contexts in rows])
        residuals = [*control["down_block_additional_residuals"], control["mid_block_additional_residual"]]
        return eps.numpy(), [residual.numpy() for residual in residuals]

    return denoise


def export(base: Base, folder: Path) -> None:
    """The graphs that `engine_denoiser` runs, and their weights."""
    weights = {
        f"{prefix}.{key}": value.contiguous()
        for prefix in ("unet", "controlnet")
        for key, value in base.networks()[prefix].state_dict().items()
    }
    save_file(weights, folder / "base.safetensors")
    for name, graph in trace_graphs(base, (CONTROLNET_COND, CONTROLNET, DENOISER)).items():
        save_graph(graph, folder / "base.safetensors", folder / f"{name}.onnx")


@contextmanager
def engine_denoiser(run: Recording, folder: Path, backend: str) -> Iterator[Denoiser]:
    base = base_of(run)
    project = KVProjector.of_base(base)
    specs = graph_specs(geometry(base)) | split_specs(geometry(base), unet_split(base))
    with ExitStack() as stack:
        embed, controlnet, denoiser = (
            stack.enter_context(closing(open_engine(folder / f"{name}.onnx", specs[name], backend)))
            for name in (CONTROLNET_COND, CONTROLNET, DENOISER)
        )
        hint = embed({"edges": run.io["hint"].numpy()})["hint"].copy()

        def denoise(latent: torch.Tensor, t: int, stage: int) -> tuple[np.ndarray, list[np.ndarray]]:
            style, rows = contexts_of(run, stage)
            feeds = {"latent": latent.numpy(), "timestep": np.full(len(latent), t), "hint": hint}
            feeds |= {"kv_control": project(style)[1].numpy(), "control_scale": np.array(1, np.float32)}
            kv_unet = np.stack([project(contexts)[0].numpy() for contexts in rows])
            eps = denoiser({**feeds, "kv_unet": kv_unet})["eps"].copy()
            return eps, [residual.copy() for residual in controlnet(feeds).values()]

        yield denoise


def differences(run: Recording, denoise: Denoiser) -> dict[str, float]:
    """By quantity the largest difference in any step, relative to the largest magnitude recorded."""
    io, found = run.io, defaultdict[str, float](float)

    def compare(name: str, ours: Any, recorded: torch.Tensor) -> None:
        found[name] = max(found[name], relative_error(np.asarray(ours), recorded.numpy(), name))

    schedule = TimestepSchedule.build(NoiseSchedule(), run.steps, run.strength, 10, "ddim_lsast")
    assert [step.t for step in schedule.steps] == io["timesteps"].tolist()
    solver, x = make_solver(schedule), schedule.add_noise(io["z0"].numpy(), io["noise"].numpy())
    compare("start_latent", x, io["start_latent"])
    names = ["eps_cond"] if run.guidance == 1 else ["eps_uncond", "eps_cond"]
    batch = len(x)
    for step in schedule.steps:
        rows = slice(step.index * batch, (step.index + 1) * batch)
        compare("free_latent", x, io["latents_in"][rows])
        forced, residuals = denoise(io["latents_in"][rows], step.t, step.stage)
        free, _ = denoise(torch.from_numpy(x), step.t, step.stage)
        for name, own, own_free in zip(names, forced, free, strict=True):
            compare(name, own, io[name][rows])
            compare(f"free_{name}", own_free, io[name][rows])
        if step.index == 0:
            for index, residual in enumerate(residuals):
                compare(f"control_residual_{index:02}", residual, io[f"control_residual_{index:02}"])
        x = np.asarray(solver.step(guide(free, run.guidance), step.index, x), np.float32)
    compare("final_latent", x, io["final_latent"])
    return dict(found)


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
def test_base_in_torch_repeats_the_released_algorithm(recipe):
    run = record(**recipe)
    errors = differences(run, torch_denoiser(run))
    assert max(errors.values()) < 3e-5, errors


@both_sets
def test_base_in_torch_repeats_the_recording(golden):
    errors = differences(golden.recording(), torch_denoiser(golden.recording()))
    assert max(errors.values()) < 1e-4, errors


TINY: dict[str, Any] = {"channel_mult": (1, 2), "num_heads": 8, "context_dim": 64, "tokens": 77}
"""The architecture of `TINY_UNET`, whose graphs are traced for other tests too."""

RUNS: dict[str, dict[str, Any]] = {
    "not square": {"size": (8, 4)},
    "31 points, all of them but one": {"steps": 30, "strength": 1.0, "size": (4, 6)},
    "unguided": {"guidance": 1.0, "steps": 10, "strength": 0.7},
    "a batch": {"batch": 2, "steps": 7, "strength": 0.9, "size": (6, 4)},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of `TINY`, which all of `RUNS` have in common."""
    folder = tmp_path_factory.mktemp("graphs")
    export(base_of(record(**TINY)), folder)
    return folder


# A second backend computes the same graphs: two of the runs are enough for it.
@pytest.mark.parametrize(
    ("recipe", "backend"),
    [
        pytest.param(recipe, backend, id=f"{name}-{backend}")
        for name, recipe in RUNS.items()
        for backend in (BACKENDS if name in ("not square", "a batch") else BACKENDS[:1])
    ],
)
def test_exported_graphs_repeat_the_released_algorithm(tiny, recipe, backend):
    run = record(**TINY, **recipe)
    with engine_denoiser(run, tiny, backend) as denoise:
        errors = differences(run, denoise)
    assert max(errors.values()) < 3e-5, errors


@pytest.mark.slow
@both_sets
@pytest.mark.parametrize("backend", BACKENDS)
def test_exported_graphs_repeat_the_recording(golden, tmp_path, backend):
    run = golden.recording()
    export(base_of(run), tmp_path)
    with engine_denoiser(run, tmp_path, backend) as denoise:
        errors = differences(run, denoise)
    assert max(errors.values()) < 1e-4, errors


def _assert_near(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()), msg=name)


@both_sets
def test_oracle_repeats_the_recording(golden):
    # On the released code's recording: without it, what the oracle records proves nothing about that code.
    run = golden.recording()
    found = released_lsast.sample(run.io, run.unet, run.control, run.heads, run.steps, run.strength, run.guidance)
    for name, value in found.items():
        _assert_near(value, run.io[name].float(), name)
    for case in golden.training_cases():
        loss, index, gradient = released_lsast.training_step(
            run.unet, case["z"], case["noise"], int(case["t"]), case["contexts"], golden.heads
        )
        assert [index] == case["grad_index"].tolist()
        assert loss == pytest.approx(case["loss"].item(), rel=1e-5)
        _assert_near(gradient, case["grad"], "grad")
    made = golden.generator()
    state = {name.removeprefix("attention."): value for name, value in load_module_tensors(golden.checkpoint).items()}
    _assert_near(released_lsast.generator(state, made["initial"][0]), made["prompts"], "prompts")
