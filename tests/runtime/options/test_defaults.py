"""Which default stands: what is asked for, then what the style says, then what the bundle says."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import lsast
from lsast.cli.main import main
from lsast.options.defaults import Defaults
from lsast.options.presets import PRESETS
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.style import Style, StyleFile

OWN = {"vangogh": {"guidance": 5.0, "steps": 4}, "monet": {"guidance": 5.0, "strength": 1.0}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, bundle_path: Path) -> Path:
    """The tiny bundle, whose two styles have defaults of their own."""
    folder = tmp_path_factory.mktemp("own") / "tiny"
    shutil.copytree(bundle_path, folder)
    for name, values in OWN.items():
        file = folder / "styles" / f"{name}.safetensors"
        style = StyleFile(file)
        rows = [style.stage(stage) for stage in range(style.stages)]
        kv_unet, kv_control = (np.stack([row[side] for row in rows]) for side in (0, 1))
        meta = {"defaults": json.dumps(values)}
        Style(name, style.base, style.stages, style.tokens, kv_unet, kv_control, meta).save(file)
    return folder


def test_the_style_comes_before_the_bundle(path: Path) -> None:
    bundle = Bundle.open(path)
    found = Defaults(bundle).resolve({"style": "monet"})
    assert (found.guidance, found.strength, found.steps) == (5.0, 1.0, bundle.manifest.defaults["steps"])
    assert Defaults(bundle).resolve({}).steps == 4  # the bundle's own style is no exception


def test_what_is_asked_for_comes_before_the_style(path: Path) -> None:
    assert Defaults(Bundle.open(path)).resolve({"style": "monet", "guidance": 1.0, "strength": None}).guidance == 1.0


def test_a_mix_takes_what_its_styles_agree_on(path: Path) -> None:
    bundle = Bundle.open(path)
    found = Defaults(bundle).resolve({"style": "vangogh:0.3+monet"})
    defaults = bundle.manifest.defaults
    assert (found.guidance, found.steps, found.strength) == (5.0, defaults["steps"], defaults["strength"])


def test_an_unknown_style_is_told_by_the_bundle(path: Path, photo: np.ndarray) -> None:
    with lsast.load(path) as stylizer, pytest.raises(lsast.UsageError, match="found no style 'nobody'"):
        stylizer.stylize(photo, style="nobody")


def test_a_painting_is_that_of_the_same_options_given(path: Path, bundle_path: Path, photo: np.ndarray) -> None:
    with lsast.load(path) as own, lsast.load(bundle_path) as plain:
        left = own.stylize(photo, style="monet")
        right = plain.stylize(photo, style="monet", **OWN["monet"])
        assert left.options == right.options
        np.testing.assert_array_equal(np.asarray(left.image), np.asarray(right.image))


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory, bundle_path: Path) -> Path:
    """The tiny bundle; vangogh and monet have guidance 7 baked in, `five` has 5, `plain` none."""
    folder = tmp_path_factory.mktemp("baked") / "tiny"
    shutil.copytree(bundle_path, folder)
    style = Bundle.open(folder).style("vangogh")
    scales = {"vangogh": "7", "monet": "7", "five": "5", "plain": None}
    for name, scale in scales.items():
        meta = {"defaults": json.dumps({"steps": 4, "guidance": 6.0}), **({"guidance_baked": scale} if scale else {})}
        made = Style(name, style.base, style.stages, style.tokens, style.kv_unet, style.kv_control, meta)
        made.save(folder / "styles" / f"{name}.safetensors")
    return folder


def test_a_style_with_guidance_baked_in_is_painted_in_one_pass(baked: Path, photo: np.ndarray) -> None:
    bundle = Bundle.open(baked)
    assert bundle.open_style("five").distilled_guidance == 5.0
    assert bundle.open_style("plain").distilled_guidance is None
    found = Defaults(bundle).resolve({"style": "five"})
    assert (found.guidance, found.steps) == (1.0, 4)
    assert Defaults(bundle).resolve({"style": "five", "guidance": 1}).guidance == 1
    assert Defaults(bundle).resolve({"style": "vangogh:0.3+monet@0-4"}).guidance == 1.0
    assert Defaults(bundle).resolve({"style": "plain"}).guidance == 6.0
    # The released preset asks for 10; it is no more asked for than the bundle's own default is.
    assert Defaults(bundle).resolve({"style": "five", "preset": "released"}).guidance == 1.0
    with lsast.load(baked) as stylizer:
        assert stylizer.stylize(photo, style="five").options.guidance == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"style": "five", "guidance": 3.0}, r"found guidance 3.0 .*baked in \(five 5\); expected 1, or none"),
        ({"style": "five+plain"}, r"unequal guidance baked in \(five 5, plain without\); .* distil"),
        ({"style": "vangogh@0-4+five@5-9"}, r"unequal guidance baked in \(vangogh 7, five 5\)"),
    ],
)
def test_guidance_is_not_applied_twice(baked: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(lsast.UsageError, match=message):
        Defaults(Bundle.open(baked)).resolve(given)


def test_a_baked_scale_that_is_none_is_damage(baked: Path, tmp_path: Path) -> None:
    style = Bundle.open(baked).style("plain")
    broken = Style("x", style.base, 10, style.tokens, style.kv_unet, style.kv_control, {"guidance_baked": "much"})
    broken.save(tmp_path / "x.safetensors")
    with pytest.raises(lsast.StyleError, match="guidance_baked: found 'much'; expected a number above 0"):
        StyleFile(tmp_path / "x.safetensors")


def test_list_styles_tells_what_is_baked(baked: Path) -> None:
    told = json.loads(CliRunner().invoke(main, ["--bundle", str(baked), "--list-styles", "--json"]).stdout)
    assert told["guidance_baked"] == {"vangogh": 7.0, "monet": 7.0, "five": 5.0}


def test_a_preset_comes_before_the_style_and_behind_what_is_asked_for(path: Path) -> None:
    bundle = Bundle.open(path)
    defaults = bundle.manifest.defaults
    found = Defaults(bundle).resolve({"style": "vangogh", "preset": "fast", "solver": "ddim"})
    # steps of the preset, solver as asked for, guidance of the style, strength of the bundle
    assert (found.steps, found.solver, found.guidance, found.strength) == (8, "ddim", 5.0, defaults["strength"])
    assert (found.preset, found.cache_interval) == ("fast", 2)


def test_exact_is_what_runs_where_nothing_is_said(path: Path) -> None:
    bundle = Bundle.open(path)
    said, unsaid = (Defaults(bundle).resolve({"style": "monet", "preset": preset}) for preset in ("exact", None))
    assert dataclasses.replace(said, preset=None) == unsaid
    assert (said.preset, unsaid.preset) == ("exact", None)


def test_a_stylizer_may_have_a_preset_that_a_call_overrules(path: Path) -> None:
    bundle = Bundle.open(path)
    defaults = Defaults(bundle, "balanced")
    assert defaults.resolve({}).preset == "balanced"
    assert defaults.resolve({"preset": "exact"}).cache_interval == 1
    with pytest.raises(lsast.UsageError, match="found preset 'quick'; expected one of exact, balanced, fast, released"):
        Defaults(bundle, "quick")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_meant(path: Path, preset: str) -> None:
    options = Defaults(Bundle.open(path)).resolve({"preset": preset})
    assert {name: getattr(options, name) for name in PRESETS[preset]} == PRESETS[preset]
