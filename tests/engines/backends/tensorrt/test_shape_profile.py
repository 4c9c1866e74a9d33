"""Optimization profiles, against shapes worked out by hand."""

from __future__ import annotations

import pytest

from lsast_engines.backends.base import output_shapes
from lsast_engines.backends.tensorrt.shape_profile import Range, ShapeRanges, check_profile
from lsast_engines.bundle.graph_spec import Geometry, UnetSplit, graph_specs, split_specs
from lsast_engines.errors import BackendError, UsageError

GEOMETRY = Geometry(hint_channels=6, tokens=8, unet_width=40, control_width=16)
SPECS = graph_specs(GEOMETRY)


def test_profile_of_a_split_graph_halves_deeper_levels() -> None:
    cut = UnetSplit(residuals=((6, 0), (6, 1), (9, 3)), outer=1, feature=7)
    specs = split_specs(GEOMETRY, cut)
    profile = ShapeRanges().profile(specs["unet_full"])
    assert profile["residual_1"] == ((1, 6, 24, 24), (1, 6, 32, 32), (4, 6, 64, 64))
    assert profile["residual_2"] == ((1, 9, 6, 6), (1, 9, 8, 8), (4, 9, 16, 16))
    shapes = {"latent": (2, 4, 48, 64), "hint": (2, 6, 48, 64), "timestep": (2,), "kv_control": (2, 8, 16)}
    found = output_shapes(specs["controlnet"], {**shapes, "control_scale": ()})
    assert found == {"residual_0": (2, 6, 48, 64), "residual_1": (2, 6, 24, 32), "residual_2": (2, 9, 6, 8)}


def test_profile_and_output_shapes_match_values_by_hand() -> None:
    profile = ShapeRanges().profile(SPECS["denoiser"])
    # By hand: 384, 512 and 1024 pixels are 48, 64 and 128 cells.
    assert profile["latent"] == ((1, 4, 48, 48), (1, 4, 64, 64), (4, 4, 128, 128))
    assert profile["kv_unet"] == ((1, 1, 8, 40), (2, 1, 8, 40), (2, 4, 8, 40))
    assert profile["control_scale"] == ((), (), ())
    assert profile["timestep"] == ((1,), (1,), (4,))
    assert ShapeRanges().profile(SPECS["vae_encoder"])["image"].max == (1, 3, 1024, 1024)
    assert output_shapes(SPECS["vae_encoder"], {"image": (2, 3, 384, 512)})["std"] == (2, 4, 48, 64)
    assert output_shapes(SPECS["vae_decoder"], {"latent": (2, 4, 48, 64)}) == {"image": (2, 3, 384, 512)}


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"side": Range(512, 384, 1024)}, "side: found 512, 384, 1024; expected minimum, optimum and maximum"),
        ({"side": Range(380, 512, 1024)}, "expected multiples of 8"),
        ({"batch": Range(0, 1, 4)}, "batch: found 0, 1, 4"),
        ({"guidance": Range(1, 2, 3)}, "guidance: found 3 passes"),
    ],
)
def test_shape_ranges_refuse_invalid_values(ranges: dict[str, Range], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ShapeRanges(**ranges)


def test_check_profile_lists_all_faults() -> None:
    profile = ShapeRanges().profile(SPECS["denoiser"])
    check_profile(profile, {"latent": (4, 4, 48, 128)}, "denoiser")
    with pytest.raises(BackendError) as caught:
        check_profile(profile, {"latent": (5, 4, 64, 64), "hint": (1, 6, 40, 64)}, "denoiser")
    assert "latent: found [5, 4, 64, 64]; expected [1, 4, 48, 48] to [4, 4, 128, 128]" in str(caught.value)
    assert "hint: found [1, 6, 40, 64]" in str(caught.value)
