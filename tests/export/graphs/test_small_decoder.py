"""A tiny autoencoder's decoder in a bundle: against diffusers' own, added safely, refused where it does not belong."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from lsast_engines.backends.onnxruntime import GPU_SUFFIX
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import VAE_DECODER_TINY
from lsast_engines.bundle.manifest import Manifest
from lsast_engines.errors import ExportError
from lsast_export.bundle.add_decoder import add_small_decoder
from lsast_export.bundle.check import check_bundle
from lsast_export.cli.main import main
from lsast_export.graphs.small_decoder import WEIGHTS, SmallDecoder, read_small_decoder, trace_small_decoder
from lsast_export.graphs.trace import TracedGraph
from lsast_export.quantize.options import QuantizeOptions
from lsast_export.quantize.quantize import quantize_bundle

GRAPH = f"{VAE_DECODER_TINY}.onnx"
SCALE = 0.5


def _random(**changes: Any) -> AutoencoderTiny:
    config: dict[str, Any] = {
        "encoder_block_out_channels": (8, 8),
        "num_encoder_blocks": (1, 1),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "num_decoder_blocks": (1, 2, 1, 1),
        "scaling_factor": SCALE,
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return AutoencoderTiny(**config).eval().requires_grad_(False)


@pytest.fixture(scope="session", autouse=True)
def _one_decoder_trace() -> Iterator[None]:
    """Equal architectures are traced once: it takes nearly all the time, and reads no weight."""
    traces: dict[str, TracedGraph] = {}

    def trace_once(small: SmallDecoder, manifest: Manifest) -> TracedGraph:
        key = f"{small.config} {manifest.geometry} {manifest.latent_scale} {manifest.multiple}"
        if key not in traces:
            traces[key] = trace_small_decoder(small, manifest)
        return traces[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lsast_export.bundle.add_decoder.trace_small_decoder", trace_once)
        yield


@pytest.fixture(scope="session")
def tiny() -> AutoencoderTiny:
    return _random()


@pytest.fixture(scope="session")
def folder(tiny: AutoencoderTiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AutoencoderTiny as diffusers saves it; tests must not change it."""
    path = tmp_path_factory.mktemp("tiny")
    tiny.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def manifest(bundles: dict[str, Bundle]) -> Manifest:
    return bundles["fp16"].manifest


@pytest.fixture(scope="session")
def added(bundles: dict[str, Bundle], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The fp16 bundle with the small decoder; tests must not change it."""
    path = shutil.copytree(bundles["fp16"].path, tmp_path_factory.mktemp("added") / "bundle")
    return add_small_decoder(path, read_small_decoder(folder, bundles["fp16"].manifest))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (1, 4, 24, 8)])
def test_small_decoder_graph_matches_diffusers(added, run, tiny, shape, backend):
    latent = 3 * np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    found = run(added, VAE_DECODER_TINY, backend=backend, latent=latent)["image"]
    # As a pipeline decodes: z / latent_scale is the base's own latent, z / scaling_factor the tiny autoencoder's.
    scaled = torch.from_numpy(latent) * added.manifest.latent_scale
    expected = tiny.decode(scaled / SCALE).sample.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for other in (scaled, torch.from_numpy(latent)):
        assert np.abs(tiny.decode(other).sample.numpy() - expected).max() > 1e-3, "a factor without effect"
    assert added.manifest.graphs[VAE_DECODER_TINY].inputs == added.manifest.graphs["vae_decoder"].inputs
    assert added.manifest.graphs[VAE_DECODER_TINY].outputs == added.manifest.graphs["vae_decoder"].outputs


def test_add_small_decoder_changes_no_other_file(added, bundles):
    before, new = bundles["fp16"], {GRAPH, WEIGHTS, f"{VAE_DECODER_TINY}{GPU_SUFFIX}"}
    assert {path.name for path in added.path.iterdir()} == {path.name for path in before.path.iterdir()} | new
    for file in before.path.rglob("*.*"):
        if file.name != "manifest.json":
            assert (added.path / file.relative_to(before.path)).read_bytes() == file.read_bytes()
    manifest = Bundle.open(added.path).manifest
    kept = {name: getattr(before.manifest, name) for name in ("graphs", "parity", "files")}
    assert dataclasses.replace(manifest, **kept) == before.manifest
    assert {name: entry for name, entry in manifest.files.items() if name not in new} == kept["files"]
    assert 0 < added.manifest.parity[VAE_DECODER_TINY] < 1e-5
    modes = {(added.path / name).stat().st_mode & 0o777 for name in (GRAPH, WEIGHTS, "manifest.json")}
    assert len(modes) == 1, "whoever may read the manifest may read the rest"


def test_add_small_decoder_replaces_an_earlier_one(added, run, tmp_path):
    path = shutil.copytree(added.path, tmp_path / "bundle")
    other = _random(num_decoder_blocks=(1, 1, 1, 1), scaling_factor=2.0)
    other.save_pretrained(tmp_path / "other")
    written = add_small_decoder(path, read_small_decoder(tmp_path / "other", added.manifest))
    latent = np.random.default_rng(2).standard_normal((1, 4, 8, 8), dtype=np.float32)
    expected = other.decode(torch.from_numpy(latent) * written.manifest.latent_scale / 2).sample.numpy()
    np.testing.assert_allclose(run(written, VAE_DECODER_TINY, latent=latent)["image"], expected, rtol=0, atol=1e-5)


def test_read_small_decoder_lists_every_fault(tmp_path, manifest):
    stranger = _random(latent_channels=16, num_decoder_blocks=(1, 1, 1), decoder_block_out_channels=(8, 8, 8))
    stranger.register_to_config(shift_factor=0.1, scaling_factor=0)
    stranger.save_pretrained(tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    state["decoder.layers.0.bias"] = torch.zeros(9)
    state["decoder.layers.99.weight"] = torch.zeros(1, dtype=torch.int64)
    del state["decoder.layers.0.weight"]
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ExportError) as caught:
        read_small_decoder(tmp_path, manifest)
    for fault in (
        "latent channels: found 16; expected 4",
        "pixels along a side of a latent cell: found 4; expected 8",
        "a shift_factor of: found 0.1; expected 0",
        "a scaling_factor of: found 0; expected a number above 0",
        "decoder.layers.99.weight: found torch.int64; expected floats",
        "decoder.layers.99.weight: not expected",
        "decoder.layers.0.weight: missing",
        "decoder.layers.0.bias: found shape [9]; expected [8]",
    ):
        assert f"  - {fault}" in str(caught.value)


def test_read_small_decoder_of_another_autoencoder_is_refused(tmp_path, manifest, folder):
    AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path / "kl")
    with pytest.raises(ExportError, match="found AutoencoderKL; expected AutoencoderTiny"):
        read_small_decoder(tmp_path / "kl", manifest)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ExportError, match=r"(?s)found no weights; expected .*found no config.json"):
        read_small_decoder(tmp_path / "bare", manifest)
    with pytest.raises(ExportError, match="found nothing at"):
        read_small_decoder(tmp_path / "nowhere", manifest)
    odd = shutil.copytree(folder, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "act_fn": "nothing"}))
    with pytest.raises(ExportError, match="diffusers cannot build an AutoencoderTiny"):
        read_small_decoder(odd, manifest)


def test_quantized_bundle_takes_and_keeps_the_small_decoder_in_float32(bundles, added, folder, tmp_path, run):
    latent = np.random.default_rng(4).standard_normal((1, 4, 8, 8), dtype=np.float32)
    expected = run(added, VAE_DECODER_TINY, latent=latent)["image"]
    quantized = quantize_bundle(added, tmp_path / "int8", QuantizeOptions(pictures=1, size=64, target=0))
    np.testing.assert_array_equal(run(quantized, VAE_DECODER_TINY, latent=latent)["image"], expected)
    small = read_small_decoder(folder, quantized.manifest)
    taken = add_small_decoder(quantized.path, small)
    assert taken.manifest.storage_dtype == "int8"
    np.testing.assert_array_equal(run(taken, VAE_DECODER_TINY, latent=latent)["image"], expected)


def test_check_bundle_measures_the_small_decoder(added):
    report = check_bundle(added.path)
    assert report.passed
    assert report.figures[VAE_DECODER_TINY] == pytest.approx(added.manifest.parity[VAE_DECODER_TINY], rel=10)


def test_decoder_command_reports_parity_and_a_new_export_keeps_it(bundles, folder, tmp_path):
    path = shutil.copytree(bundles["fp16"].path, tmp_path / "bundle")
    result = CliRunner().invoke(main, ["decoder", str(path), "--small", str(folder), "--json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["bundle"] == str(path)
    assert set(report["parity"]) == {VAE_DECODER_TINY}
    assert report["bytes"] == sum((path / name).stat().st_size for name in (GRAPH, WEIGHTS))
    assert "comparing vae_decoder_tiny" in result.stderr
    refused = CliRunner().invoke(main, ["decoder", str(path), "--small", "nowhere"])
    assert refused.exit_code == 1
    assert "found nothing at nowhere" in refused.stderr

    weights = (path / WEIGHTS).read_bytes()
    again = CliRunner().invoke(main, ["bundle", "--base", str(path), "--out", str(path)])
    assert again.exit_code == 0, again.stderr
    assert VAE_DECODER_TINY in Bundle.open(path).manifest.parity
    assert (path / WEIGHTS).read_bytes() == weights


def test_read_small_decoder_takes_taesds_own_files_and_half_folders(manifest, folder, tmp_path):
    """``taesd_decoder.pth`` of github.com/madebyollin/taesd counts a layer more: the one that bounds the latents."""
    network = AutoencoderTiny().eval()
    layers = {key.removeprefix("decoder.layers."): v for key, v in network.state_dict().items() if "decoder." in key}
    own = {f"{int(key.split('.')[0]) + 1}.{key.split('.', 1)[1]}": value for key, value in layers.items()}
    torch.save(own, tmp_path / "taesd_decoder.PTH")
    save_file(network.state_dict(), tmp_path / "whole.safetensors")
    network.half().save_pretrained(tmp_path / "half", variant="fp16")
    for name, rounded in (("taesd_decoder.PTH", False), ("whole.safetensors", False), ("half", True)):
        small = read_small_decoder(tmp_path / name, manifest)
        assert small.scale == 1
        found = small.autoencoder.decoder.state_dict()
        expected = {f"layers.{key}": value.half().float() if rounded else value for key, value in layers.items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    with pytest.raises(ExportError, match=r"decoder\.layers\.3\.conv\.0\.weight: missing"):  # it is no TAESD
        read_small_decoder(folder / "diffusion_pytorch_model.safetensors", manifest)
