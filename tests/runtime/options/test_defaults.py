"""Precedence of defaults: the call, then its preset, then the style, then the bundle."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lsast
from lsast import Stylizer
from lsast.options.options import PRESETS, preset_options
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.style import encode_defaults

OWN = {"vangogh": {"guidance": 5.0, "steps": 4}, "monet": {"guidance": 5.0, "strength": 1.0}}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, split_path: Path) -> Iterator[Stylizer]:
    """The tiny bundle, whose two styles have defaults of their own."""
    folder = tmp_path_factory.mktemp("own") / "tiny"
    shutil.copytree(split_path, folder)
    for name, values in OWN.items():
        style = dataclasses.replace(Bundle.open(folder).style(name), meta=encode_defaults(values))
        style.save(folder / "styles" / f"{name}.safetensors")
    with lsast.load(folder) as opened:
        yield opened


def test_resolve_prefers_the_call_to_the_style_and_the_style_to_the_bundle(own, photo):
    found, defaults = own.resolve(style="monet"), own.bundle.manifest.defaults
    assert (found.guidance, found.strength, found.steps) == (5.0, 1.0, defaults["steps"])
    assert own.resolve(style="monet", guidance=1.0, strength=None).guidance == 1.0
    found = own.resolve(style="vangogh:0.3+monet")  # of a mix counts what its styles agree on
    assert (found.guidance, found.steps, found.strength) == (5.0, defaults["steps"], defaults["strength"])
    assert own.resolve().steps == 4  # the bundle's own style is no exception
    found, given = own.stylize(photo, "monet"), own.stylize(photo, "monet", **OWN["monet"], steps=defaults["steps"])
    assert found.options == given.options
    np.testing.assert_array_equal(found.image, given.image)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, bundle_path: Path) -> Iterator[Stylizer]:
    """The tiny bundle; vangogh and monet have guidance 7 baked in, `five` has 5, `plain` none."""
    folder = tmp_path_factory.mktemp("baked") / "tiny"
    shutil.copytree(bundle_path, folder)
    style = Bundle.open(folder).style("vangogh")
    for name, scale in {"vangogh": "7", "monet": "7", "five": "5", "plain": None, "much": "much"}.items():
        meta = {**encode_defaults({"steps": 4, "guidance": 6.0}), **({"guidance_baked": scale} if scale else {})}
        dataclasses.replace(style, name=name, meta=meta).save(folder / "styles" / f"{name}.safetensors")
    with lsast.load(folder) as opened:
        yield opened


def test_resolve_with_distilled_guidance_sets_guidance_1(distilled, photo):
    assert distilled.bundle.open_style("five").distilled_guidance == 5.0
    assert distilled.bundle.open_style("plain").distilled_guidance is None
    found = distilled.resolve(style="five")
    assert (found.guidance, found.steps) == (1.0, 4)
    assert distilled.resolve(style="five", guidance=1).guidance == 1
    assert distilled.resolve(style="vangogh:0.3+monet@0-4").guidance == 1.0
    assert distilled.resolve(style="plain").guidance == 6.0
    # The preset `released` has guidance 10, which counts no more than the bundle's default does.
    assert distilled.resolve(style="five", preset="released").guidance == 1.0
    assert distilled.stylize(photo, style="five").options.guidance == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"style": "five", "guidance": 3.0},
            r"found guidance 3.0 .* guidance \(five 5\); expected 1, or none",
        ),
        ({"style": "five+plain"}, r"unequal distilled guidance \(five 5, plain without\); .* distill"),
        ({"style": "vangogh@0-4+five@5-9"}, r"unequal distilled guidance \(vangogh 7, five 5\)"),
    ],
)
def test_resolve_with_distilled_guidance_refuses_guidance(distilled, given, message):
    with pytest.raises(lsast.UsageError, match=message):
        distilled.resolve(**given)


def test_resolve_with_invalid_distilled_guidance_names_it(distilled):
    with pytest.raises(lsast.StyleError, match="guidance_baked: found 'much'; expected a number above 0"):
        distilled.resolve(style="much")


def test_list_styles_reports_distilled_guidance(run, distilled):
    facts = json.loads(run("--bundle", str(distilled.bundle.path), "--list-styles", "--json").stdout)
    assert facts["guidance_baked"] == {"vangogh": 7.0, "monet": 7.0, "five": 5.0}


def test_resolve_prefers_the_call_to_the_preset_and_the_preset_to_the_style(own):
    found = own.resolve(style="vangogh", preset="fast", solver="ddim")
    # steps of the preset, solver of the call, guidance of the style, strength of the bundle
    strength = own.bundle.manifest.defaults["strength"]
    assert (found.steps, found.solver, found.guidance, found.strength) == (8, "ddim", 5.0, strength)
    assert (found.preset, found.cache_interval) == ("fast", 2)


def test_resolve_with_preset_exact_equals_no_preset(own):
    exact, none = (own.resolve(style="monet", preset=preset) for preset in ("exact", None))
    assert dataclasses.replace(exact, preset=None) == none
    assert (exact.preset, none.preset) == ("exact", None)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_options_are_valid(own, preset):
    options = own.resolve(preset=preset)
    assert {name: getattr(options, name) for name in preset_options(preset)} == preset_options(preset)
