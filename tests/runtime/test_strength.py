"""Strength by stage: its grammar, and its formula against DDIM written out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lsast
from lsast import Stylizer, UsageError, sampler
from lsast.strength import Strength
from lsast_engines.noise import NoiseSpec
from lsast_engines.schedule import Schedule
from lsast_engines.solvers import make_solver
from lsast_engines.style import Style


@pytest.fixture(scope="module")
def stylizer(bundle_path: Path) -> Iterator[Stylizer]:
    with lsast.load(bundle_path) as opened:
        yield opened


def test_a_number_or_a_text() -> None:
    assert Strength.parse(0.7) == Strength(0.7)
    assert Strength.parse("0.7").overall == 0.7
    strength = Strength.parse("0.8, 0.5@3-9 ,0@0,1@4")
    assert strength.overall == 0.8
    assert [strength.share(stage) for stage in range(10)] == [0, 1, 1, 0.5, 1, 0.5, 0.5, 0.5, 0.5, 0.5]


FAULTS = [
    ("", "", "from 0 to 1"),
    ("0.7,", "0.7,", "from 0 to 1"),
    ("0.7,x@0-2", "0.7,", "from 0 to 1"),
    ("1.2", "", "from 0 to 1"),
    ("0.7,0.3", "0.7,", "second strength"),
    ("0", "", "above 0"),
    ("0.3@0-2", "", "no strength of the whole"),
    ("0.7,0.3@2-0", "0.7,0.3@", "expected 0-2"),
    ("0.7,0.3@", "0.7,0.3@", "a range such as"),
    ("0.7,0.3@up", "0.7,0.3@", "a range such as"),
]


@pytest.mark.parametrize(("text", "before", "words"), FAULTS)
def test_a_fault_is_pointed_at(text: str, before: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        Strength.parse(text)
    assert str(caught.value).split("\n")[1:] == [f"    {text}", f"    {' ' * len(before)}^"]


def test_a_stage_that_the_bundle_lacks_is_pointed_at(stylizer: Stylizer, photo: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"found stage 10; expected 0 to 9\n    0.7,1@3,0.3@4-10\n {16}\^"):
        stylizer.stylize(photo, strength="0.7,1@3,0.3@4-10")


class _Wavy:
    """A denoiser whose noise is a function of latent and time, and of nothing else."""

    backend, arithmetic = "numpy", "fp32"

    def bind(self, feeds: Any) -> None:
        pass

    def rest(self) -> None:
        pass

    def __call__(self, feeds: dict[str, Any]) -> dict[str, np.ndarray]:
        return {"eps": _eps(feeds["latent"], feeds["timestep"][0])[None].astype(np.float32)}


def _eps(latent: np.ndarray, t: int) -> np.ndarray:
    return np.sin(3 * latent + t / 100)


def _run(solver: str, share: Any, steps: int = 12) -> tuple[np.ndarray, Any]:
    """Denoise two latents with a fake denoiser; the result, and what went in."""
    noise, rng = NoiseSpec(), np.random.default_rng(0)
    schedule = Schedule.build(noise, steps, 0.7, 10, solver)
    z0, n = (rng.standard_normal((4, 6, 8)).astype(np.float32) for _ in range(2))
    style = Style("s", "ab", 10, 1, np.zeros((10, 1, 1)), np.zeros((10, 1, 1)))
    row = sampler.Row(
        solver=make_solver(solver, noise, schedule),
        schedule=schedule,
        z0=z0,
        noisy=schedule.add_noise(z0, n, schedule.start_t),
        hint=np.zeros((1, 6, 8), np.float32),
        hand=style,
        guidance=1.0,
        share=share,
    )
    return sampler.denoise(_Wavy(), [row], style, 1.0)[0], (schedule, z0, n)  # type: ignore[arg-type]


def test_the_share_enters_the_clean_prediction_of_its_stages() -> None:
    shares = [0.25, 1.0, 1.0, 0.6, 0.6, 0.0, 1.0, 1.0, 1.0, 1.0]
    found, (schedule, z0, n) = _run("ddim", lambda stage: None if shares[stage] == 1 else np.float32(shares[stage]))
    abar = NoiseSpec().alphas_cumprod()
    t = schedule.start_t
    z = np.sqrt(abar[t]) * z0.astype(float) + np.sqrt(1 - abar[t]) * n
    for step in schedule.steps:
        a, w = abar[step.t], shares[step.t // 100]
        x0 = (z - np.sqrt(1 - a) * _eps(z, step.t)) / np.sqrt(a)
        x0 = w * x0 + (1 - w) * z0
        eps = (z - np.sqrt(a) * x0) / np.sqrt(1 - a)
        b = abar[step.t_prev] if step.t_prev >= 0 else abar[0]
        z = np.sqrt(b) * x0 + np.sqrt(1 - b) * eps
    np.testing.assert_allclose(found, z, atol=2e-4)
    assert {step.stage for step in schedule.steps} >= {0, 1, 3, 4, 5}


@pytest.mark.parametrize(("solver", "rest"), [("ddim", True), ("dpmpp2m", False), ("unipc", False)])
def test_where_the_share_is_0_the_picture_stays_with_every_solver(solver: str, rest: bool) -> None:
    """In one half of the latent nothing is painted: it ends as z0, noised to where the schedule ends."""
    share = np.ones((6, 8), np.float32)
    share[:, :4] = 0
    found, (_, z0, n) = _run(solver, lambda stage: share)
    free, _ = _run(solver, lambda stage: None)
    abar = NoiseSpec().alphas_cumprod()[0] if rest else 1.0
    expected = np.sqrt(abar) * z0 + np.sqrt(1 - abar) * n
    np.testing.assert_allclose(found[:, :, :4], expected[:, :, :4], atol=1e-3)
    np.testing.assert_allclose(found[:, :, 4:], free[:, :, 4:], atol=1e-3)
    assert np.abs(free[:, :, :4] - expected[:, :, :4]).max() > 0.1


def test_shares_of_1_change_nothing(stylizer: Stylizer, photo: np.ndarray) -> None:
    plain = stylizer.stylize(photo, strength=0.7)
    same = stylizer.stylize(photo, strength="0.7,1@0-9")
    np.testing.assert_array_equal(same.image, plain.image)


def test_the_smaller_the_share_the_nearer_the_picture(stylizer: Stylizer) -> None:
    flat = np.repeat(np.repeat(np.random.default_rng(0).integers(60, 200, (8, 8, 3), dtype=np.uint8), 8, 0), 8, 1)
    held = np.asarray(stylizer.stylize(flat, strength="0.7,0@0-9").image).astype(int)
    distances = [
        np.abs(np.asarray(stylizer.stylize(flat, strength=f"0.7,{share}@0-9").image) - held).mean()
        for share in (0.2, 0.5, 0.8, 1)
    ]
    assert 0 < distances[0] < distances[1] < distances[2] < distances[3]
