"""`benchmarks/speed/compare.py`: its rows, its tables and its names for stable-diffusion.cpp; nothing is measured."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from diffusers import ControlNetModel
from PIL import Image

import compvis_names
from benchmarks.bench.configurations import Configuration
from lsast_engines.bundle.bundle import EMBEDDED
from lsast_engines.errors import UsageError


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    return importlib.import_module("benchmarks.speed.compare")


def test_a_row_has_a_bundle_a_backend_a_preset_and_options(compare):
    folder = str(EMBEDDED)
    own = compare.Own.parse(f"fast, 8 bits: bundle={folder}, backend=openvino:bf16, preset=fast, guidance=1", "no", 64)
    options = {"guidance": 1}
    expected = Configuration(backend="openvino", compute_dtype="bf16", preset="fast", options=options, size=64)
    assert (own.name, own.bundle, own.configuration) == ("fast, 8 bits", folder, expected)
    plain = compare.Own.parse("a: style=x:0.5+y:0.5", folder, 512)
    assert (plain.bundle, plain.configuration.backend) == (folder, "onnxruntime")
    assert plain.configuration.options == {"style": "x:0.5+y:0.5"}


@pytest.mark.parametrize("text", ["", "no options", "a: b", ": guidance=1", "a: speed=9", "a: backend=openvino:fp9"])
def test_rows_that_cannot_be_meant(compare, text):
    with pytest.raises(UsageError, match="found"):
        compare.Own.parse(text, str(EMBEDDED), 512)


def _row(name: str, by: str, seconds: float, **more: Any) -> dict[str, Any]:
    summary = {"median": seconds, "spread": 0.1}
    figures = {"picture": summary, "step": summary, "steps": 35, "gmac": 517.4, "step_fraction": 0.41, "peak_mb": 748.0}
    return {"name": name, "by": by, "compute_dtype": "fp32", "extrapolated": None, "error": None, **figures, **more}


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    """What an earlier run wrote."""
    rows = [
        _row("reference fp32", "reference", 9.0, extrapolated=6),
        _row("stable-diffusion.cpp fp32", "stable-diffusion.cpp", 12.0, gmac=None, step_fraction=None),
        {"name": "diffusers fp32", "by": "diffusers", "compute_dtype": "fp32", "error": "ended with status 1"},
        _row("lsast fast", "lsast", 1.5),
    ]
    machine = {"cpu": "Some CPU", "cores": 2, "versions": {"python": "3"}, "load": 0.1}
    report = {"bundle": "/a/mini", "size": 512, "repeats": 3, "machine": machine, "load_at_end": 0.2, "rows": rows}
    report |= {"peak_flops": {"fp32": {"numpy": 150.0}}, "not_measured": {"optimum-onnx": "has no such pipeline"}}
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(report))
    return path


def test_figures_of_before_are_shown_and_drawn(compare, figures, tmp_path):
    heights = []
    for bars in ([], ["--bar", "reference", "--bar", "lsast"]):
        told = ["--from-json", str(figures), "--chart", str(tmp_path / "chart.png"), *bars]
        result = CliRunner().invoke(compare.main, told, catch_exceptions=False)
        assert "| lsast fast | 1.5 (0.1) | 6.00 x | 35 of 1.5 (0.1) | 6.00 x | 517 | 41% | 748 |" in result.stdout
        assert "| reference fp32 | 9 (0.1), from 6 steps | 1.00 x |" in result.stdout
        assert (
            "| stable-diffusion.cpp fp32 | 12 (0.1) | 0.75 x | 35 of 12 (0.1) | 0.75 x | - | - | 748 |" in result.stdout
        )
        assert "| diffusers fp32 | ended with status 1 |" in result.stdout
        assert "- optimum-onnx: has no such pipeline" in result.stdout
        with Image.open(tmp_path / "chart.png") as image:
            heights.append(image.height)
    assert heights[0] > heights[1]
    assert (tmp_path / "chart.png").stat().st_size < 100_000


def test_names_of_a_controlnet_for_stable_diffusion_cpp():
    names = importlib.import_module("benchmarks.speed.peer_sdcpp")
    controlnet = ControlNetModel(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
        conditioning_embedding_out_channels=(4, 4, 4, 4),
    )
    keys = list(controlnet.state_dict())
    assert [names.compvis_key(key) for key in keys] == list(compvis_names.compvis_network(controlnet))
    with pytest.raises(ValueError, match="up_blocks"):
        names.compvis_key("up_blocks.0.resnets.0.conv1.weight")
