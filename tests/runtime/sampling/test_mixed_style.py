"""What a mix means: against the definition, cell by cell."""

from __future__ import annotations

import numpy as np
import pytest

from lsast.options.style_mix import Mix
from lsast.sampling.mixed_style import MixedStyle
from lsast_engines.bundle.manifest import AttentionLayer
from lsast_engines.bundle.style import Style

BASE = "ab" * 32
# Groups lie across each other on purpose: U-Net 8 columns down, 4 up, 6 down, 2 mid; ControlNet 4 mid, 6 down.
LAYERS = [
    AttentionLayer("a", "unet", "down", 0, 4),
    AttentionLayer("b", "unet", "up", 8, 2),
    AttentionLayer("c", "unet", "down", 12, 3),
    AttentionLayer("d", "unet", "mid", 18, 1),
    AttentionLayer("e", "control", "mid", 0, 2),
    AttentionLayer("f", "control", "down", 4, 3),
]
GROUP_OF = {
    "kv_unet": ["down"] * 8 + ["up"] * 4 + ["down"] * 6 + ["mid"] * 2,
    "kv_control": ["mid"] * 4 + ["down"] * 6,
}
STAGES = 10


def _style(name: str, seed: int, stages: int = STAGES) -> Style:
    rng = np.random.default_rng(seed)
    shapes = [(stages, 3, 20), (stages, 3, 10)]
    return Style(name, BASE, stages, 3, *(rng.standard_normal(shape).astype(np.float32) for shape in shapes))


STYLES = {name: _style(name, seed) for seed, name in enumerate(("vangogh", "monet", "roerich"))}
NULL = _style("null", 9, stages=1)


def _mixed(text: str) -> MixedStyle:
    return MixedStyle(Mix.parse(text), STYLES, NULL, LAYERS)


def _weights(stage: int, group: str, text: str) -> dict[str, float]:
    """The definition, written once more: weights of the terms that apply to a cell."""
    weights: dict[str, float] = {}
    for term in text.split("+"):
        name, *places = term.split("@")
        name, _, weight = name.partition(":")
        groups = [place for place in places if place.isalpha()]
        ranges = [[int(end) for end in place.split("-")] for place in places if not place.isalpha()]
        if all(group == wanted for wanted in groups) and all(ends[0] <= stage <= ends[-1] for ends in ranges):
            weights[name] = weights.get(name, 0.0) + float(weight or 1)
    return weights


MIXES = [
    "vangogh",
    "vangogh:0.6+monet:0.4",
    "vangogh:3+monet+roerich:2",
    "vangogh@up",
    "monet@0-4",
    "monet@7",
    "vangogh:0.7@up+monet@0-4",
    "vangogh@0-4@down+monet:2@down@3-9+roerich@mid",
    "vangogh+vangogh:2@up+monet",
]


@pytest.mark.parametrize("text", MIXES)
def test_mixed_style_is_the_weighted_mean_of_the_terms_that_apply(text: str) -> None:
    mixed = _mixed(text)
    for stage in range(STAGES):
        row = mixed.stage(stage)
        for tensor, groups in GROUP_OF.items():
            found = getattr(row, tensor)
            assert found.dtype == np.float32
            for column, group in enumerate(groups):
                weights = _weights(stage, group, text)
                parts = [
                    weight / sum(weights.values()) * getattr(STYLES[name], tensor)[stage, :, column].astype(float)
                    for name, weight in weights.items()
                ]
                expected = sum(parts) if parts else getattr(NULL, tensor)[0, :, column]
                np.testing.assert_allclose(found[:, column], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("text", ["vangogh", "vangogh:0.3", "vangogh+vangogh", "vangogh@down+vangogh@mid+vangogh@up"])
def test_mixed_style_of_one_style_is_that_style_to_the_bit(text: str) -> None:
    for stage in range(STAGES):
        np.testing.assert_array_equal(_mixed(text).stage(stage).kv_unet, STYLES["vangogh"].kv_unet[stage])
        np.testing.assert_array_equal(_mixed(text).stage(stage).kv_control, STYLES["vangogh"].kv_control[stage])


def test_mixed_style_reads_a_null_of_many_stages_by_stage_and_leaves_it_alone() -> None:
    null = _style("null", 11)
    before = null.kv_unet.copy()
    row = MixedStyle(Mix.parse("vangogh@up"), STYLES, null, LAYERS).stage(6)
    np.testing.assert_array_equal(row.kv_unet[:, :8], null.kv_unet[6, :, :8])
    np.testing.assert_array_equal(null.kv_unet, before)
