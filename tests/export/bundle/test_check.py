"""Re-verification of a bundle: what was tampered with is found."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from lsast_engines.bundle.bundle import EMBEDDED, Bundle
from lsast_engines.bundle.style import Style
from lsast_engines.errors import BackendError, BundleError
from lsast_export.bundle.check import check_bundle
from lsast_export.cli.main import main
from lsast_export.parity.parity import large_plan


@pytest.fixture
def copy(bundles: dict[str, Bundle], tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    return Path(shutil.copytree(bundles["fp16"].path, tmp_path / "copy"))


def rehash(folder: Path) -> None:
    """Make the manifest agree with the files again, as someone who tampers with care would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def _auto_is_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of OpenVINO; and parity is not measured."""
    pytest.importorskip("openvino")
    monkeypatch.setattr("lsast_export.bundle.check.measure_parity", lambda *_: {})
    monkeypatch.setenv("LSAST_PROCESSOR", "avx512_bf16")
    monkeypatch.setattr("lsast_engines.backends.openvino.compute_dtypes", lambda device: ("fp32", "bf16"))


def swap_weights(folder: Path) -> None:
    """Let two weights of one shape in the denoiser refer to one another's bytes: sound files, wrong computation."""
    model = onnx.load(folder / "denoiser.onnx", load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    first, second = (tensors[f"unet.mid_block.resnets.{index}.conv1.weight"].external_data for index in (0, 1))
    held = [(entry.key, entry.value) for entry in first]
    del first[:]
    first.extend(second)
    del second[:]
    for key, value in held:
        second.add(key=key, value=value)
    onnx.save(model, folder / "denoiser.onnx")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_check_bundle_of_a_sound_bundle_passes(bundles, backend):
    report = check_bundle(bundles["fp16"].path, backend)
    assert report.passed
    assert report.figures.keys() == report.recorded.keys()
    assert max(report.figures.values()) < 1e-5
    assert report.styles == ("hand",)


@pytest.mark.usefixtures("_auto_is_bf16")
def test_check_bundle_compares_a_picture_of_auto_with_float32(bundles, monkeypatch):
    report = check_bundle(bundles["fp32"].path)
    assert (report.auto.backend, report.auto.compute_dtype) == ("openvino", "bf16")
    assert report.passed is (report.auto_psnr >= 45)
    inexact = dataclasses.replace(report, auto_psnr=44.92)
    assert not inexact.passed
    monkeypatch.setattr("lsast_export.bundle.check.check_bundle", lambda *_, progress: progress("painting") or inexact)
    last = CliRunner().invoke(main, ["check", str(report.bundle)]).stderr.splitlines()[-1]
    told = "is 44.9 dB from fp32 with openvino in bf16 here; expected 45: paint with --compute-dtype fp32"
    assert last == f"Error: {report.bundle} {told}"
    both = dataclasses.replace(inexact, figures={"denoiser": 1.0}).faults
    assert ["export it again" in fault for fault in both] == [True, False]
    assert check_bundle(bundles["fp32"].path, "onnxruntime").auto is None


@pytest.mark.usefixtures("_auto_is_bf16")
@pytest.mark.parametrize(("size", "side"), [(0, 512), (100, 128)])
def test_check_bundle_paints_a_picture_of_a_legal_size(copy, monkeypatch, size, side):
    """Whatever the default of the bundle: a picture's own size, or one that is no multiple."""
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["defaults"]["size"] = size
    (copy / "manifest.json").write_text(json.dumps(manifest))
    sides: list[int] = []

    def paint(_bundle: object, contents: list[np.ndarray], *_: object, **__: object) -> list[np.ndarray]:
        sides.append(len(contents[0]))
        return contents

    monkeypatch.setattr("lsast_export.bundle.check.paint", paint)
    check_bundle(copy)
    assert sides == [side, side]


def test_check_bundle_finds_one_changed_bit_also_with_a_matching_hash(copy):
    data = bytearray((copy / "base.safetensors").read_bytes())
    data[-9] ^= 1
    (copy / "base.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match=r"base\.safetensors: found SHA-256"):
        check_bundle(copy)
    rehash(copy)
    with pytest.raises(BundleError, match=r"base\.safetensors: .* expected the fingerprint"):
        check_bundle(copy)


def test_check_command_finds_swapped_weights_by_parity(copy):
    swap_weights(copy)
    rehash(copy)
    result = CliRunner().invoke(main, ["check", str(copy), "--json", "--backend", "onnxruntime"])
    report = json.loads(result.stdout)
    assert (result.exit_code, report["passed"]) == (1, False)
    assert report["parity"]["denoiser"] > 1e-3
    assert report["parity"]["loop"] > 1e-3
    assert report["parity"]["vae_encoder"] < 1e-5
    assert "past the tolerance" in result.stderr
    assert "Traceback" not in result.stderr


def test_check_bundle_lists_faults_of_all_styles(copy):
    null_style = Style.load(copy / "null.safetensors")
    dataclasses.replace(null_style, kv_unet=null_style.kv_unet * 1.01).save(copy / "null.safetensors")
    hand = Style.load(copy / "styles" / "hand.safetensors")
    foreign = dataclasses.replace(hand, base="2" * 64)
    foreign.save(copy / "styles" / "foreign.safetensors")
    rehash(copy)
    with pytest.raises(BundleError) as caught:
        check_bundle(copy)
    assert "kv_unet is not the base's null context" in str(caught.value)
    assert "kv_control" not in str(caught.value)
    assert "222222222222" in str(caught.value)


def test_check_bundle_names_a_graph_that_onnx_refuses(copy):
    model = onnx.load(copy / "controlnet_cond.onnx", load_external_data=False)
    model.graph.node[-1].op_type = "Convolution"
    onnx.save(model, copy / "controlnet_cond.onnx")
    rehash(copy)
    with pytest.raises(BundleError, match=r"controlnet_cond\.onnx: .*Convolution"):
        check_bundle(copy)


def test_large_plan_loops_at_the_native_size(base):
    plan = large_plan(dataclasses.replace(base.config, size=512, multiple=64))
    loops = [(case.height * 64, case.width * 64) for case in plan.cases if case.loop]
    assert loops == [(512, 512), (448, 576)]
    assert len(plan.loop.schedule(base.config.noise).steps) == 3
    assert {(case.batch, case.rows) for case in plan.cases} >= {(2, 1), (2, 2), (1, 2)}


def test_check_bundle_with_an_unknown_device_is_refused_before_long_work():
    with pytest.raises(BackendError, match="found no backend 'onnxruntime' with device 'zz'"):
        check_bundle(EMBEDDED, "onnxruntime", "zz", progress=lambda phase: pytest.fail(phase))
