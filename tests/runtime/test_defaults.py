"""Which default stands: what is asked for, then what the style says, then what the bundle says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import lsast
from lsast.defaults import Defaults
from lsast_engines.bundle import Bundle
from lsast_engines.style_file import StyleFile

OWN = {"vangogh": {"guidance": 5.0, "steps": 4}, "monet": {"guidance": 5.0, "strength": 1.0}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, bundle_path: Path) -> Path:
    """The tiny bundle, whose two styles have defaults of their own."""
    from lsast_engines.style import Style

    folder = tmp_path_factory.mktemp("own") / "tiny"
    shutil.copytree(bundle_path, folder)
    for name, values in OWN.items():
        file = folder / "styles" / f"{name}.safetensors"
        style = StyleFile(file)
        rows = [style.row(stage) for stage in range(style.stages)]
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
