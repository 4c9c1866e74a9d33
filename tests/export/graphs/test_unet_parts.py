"""The denoiser in parts: against the whole denoiser, against torch where they leave something out, and added safely."""

import dataclasses
import json
import shutil
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from lsast_engines.backends.onnxruntime import GPU_SUFFIX
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import UNET_SPLIT_GRAPHS
from lsast_engines.errors import BundleError, ParityError
from lsast_export.bundle import add_graphs as adding
from lsast_export.bundle.add_graphs import add_parts
from lsast_export.bundle.check import check_bundle
from lsast_export.cli.main import main
from lsast_export.graphs.trace import TracedGraph
from lsast_export.quantize.options import QuantizeOptions
from lsast_export.quantize.quantize import quantize_bundle
from lsast_train.base.attention import layer_contexts
from lsast_train.base.kv_packing import kv_layouts
from lsast_train.base.lazy_base import load_base

Run = Callable[..., dict[str, np.ndarray]]
Feeds = Callable[..., dict[str, np.ndarray]]


def split(
    inputs: dict[str, np.ndarray], run: Run, bundle: Bundle, backend: str = "onnxruntime"
) -> dict[str, np.ndarray]:
    """What `controlnet`, then `unet_full`, give for the inputs of a denoiser; with what the parts go on with."""
    control = {name: value for name, value in inputs.items() if name != "kv_unet"}
    residuals = run(bundle, "controlnet", backend=backend, **control)
    own = {name: inputs[name] for name in ("latent", "timestep", "kv_unet")}
    return {**residuals, **run(bundle, "unet_full", backend=backend, **own, **residuals)}


def outer(bundle: Bundle, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `unet_outer` takes of it."""
    names = {tensor.name for tensor in bundle.manifest.graphs["unet_outer"].inputs}
    return {name: value for name, value in found.items() if name in names}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("shape", [(3, 2, 8, 8), (1, 1, 24, 8)])
def test_parts_in_sequence_match_the_denoiser(parted, run, feeds, shape, backend):
    inputs = feeds(parted, *shape)
    whole = run(parted, "denoiser", backend=backend, **inputs)["eps"]
    found = split(inputs, run, parted, backend)
    np.testing.assert_allclose(found["eps"], whole, rtol=0, atol=2e-6 * np.abs(whole).max())
    own = {name: inputs[name] for name in ("latent", "timestep", "kv_unet")}
    again = run(parted, "unet_outer", backend=backend, **own, **outer(parted, found))["eps"]
    np.testing.assert_allclose(again, found["eps"], rtol=0, atol=1e-6 * np.abs(whole).max())


def test_quantized_parts_match_the_quantized_denoiser(parted, run, feeds, tmp_path):
    quantised = quantize_bundle(parted, tmp_path / "int8", QuantizeOptions(pictures=1, size=64, target=0))
    inputs = feeds(parted, 2, 1, 8, 8)
    expected, whole = (run(bundle, "denoiser", **inputs)["eps"] for bundle in (parted, quantised))
    found = split(inputs, run, quantised)

    def distance(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.sqrt(np.mean((one - other) ** 2)))

    # A last bit may round the other way, and go on through all layers behind it.
    assert distance(found["eps"], whole) < distance(whole, expected) / 3
    own = {name: inputs[name] for name in ("latent", "timestep", "kv_unet")}
    again = run(quantised, "unet_outer", **own, **outer(quantised, found))["eps"]
    assert distance(again, found["eps"]) < distance(whole, expected) / 3


def test_unet_outer_on_a_cached_feature_matches_torch(parted, run, feeds):
    """diffusers' own U-Net at the next step, but that its last up block takes from below what it took before."""
    before, now = (feeds(parted, 2, 1, 8, 16, seed) for seed in (1, 2))
    source = load_base(parted.path)
    contexts = torch.randn(2, 3, parted.manifest.tokens, source.context_dim, generator=torch.Generator().manual_seed(3))
    for inputs in (before, now):
        with torch.no_grad():
            inputs["kv_unet"] = kv_layouts(source)[0].project(contexts)[None].numpy()
    found = split(before, run, parted)
    own = {name: now[name] for name in ("latent", "timestep", "kv_unet")}
    eps = run(parted, "unet_outer", **own, **outer(parted, found))["eps"][0]

    residuals = [torch.from_numpy(found[tensor.name]) for tensor in parted.manifest.graphs["controlnet"].outputs]
    kept: list[torch.Tensor] = []
    replaying = False

    def feature(_: object, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> object:
        if replaying:
            kwargs["hidden_states"] = kept[0]
        kept.append(kwargs["hidden_states"])
        return args, kwargs

    hook = source.unet.up_blocks[-1].register_forward_pre_hook(feature, with_kwargs=True)
    with torch.no_grad():
        for inputs in (before, now):
            latent, timestep = torch.from_numpy(inputs["latent"]), torch.from_numpy(inputs["timestep"])
            output = source.unet(
                latent,
                timestep,
                None,
                cross_attention_kwargs=layer_contexts(contexts),
                down_block_additional_residuals=residuals[:-1],
                mid_block_additional_residual=residuals[-1],
                return_dict=False,
            )[0]
            expected = source.eps_from_output(output, latent, timestep).numpy()
            replaying = True
    hook.remove()
    np.testing.assert_allclose(found["feature"][0], kept[0].numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(eps, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    fresh = split(now, run, parted)["eps"][0]
    assert np.abs(fresh - expected).max() > 1e-3, "a feature that does not matter proves nothing"


def test_add_parts_changes_no_other_file(parted, bundles, assert_only_added):
    new = {f"{name}{suffix}" for name in UNET_SPLIT_GRAPHS for suffix in (".onnx", GPU_SUFFIX)}
    manifest = parted.manifest
    assert_only_added(parted, bundles["fp16"], new)
    assert list(manifest.graphs) == [*bundles["fp16"].manifest.graphs, *UNET_SPLIT_GRAPHS]
    assert all(0 < manifest.parity[name] < 1e-5 for name in UNET_SPLIT_GRAPHS)
    for name in UNET_SPLIT_GRAPHS:  # no weight is stored again
        model = onnx.load(parted.graph_path(name), load_external_data=False)
        assert sum(t.ByteSize() for t in model.graph.initializer if not t.external_data) < 20_000
        assert {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"} == {
            "base.safetensors"
        }


def wrong(traced_parts: dict[str, TracedGraph]) -> dict[str, TracedGraph]:
    """Parts whose ControlNet listens to a residual of the wrong place."""
    control = traced_parts["controlnet"]
    model = control.model.clone()
    outputs = list(model.graph.outputs)
    first, second = outputs[0].producer(), outputs[1].producer()
    first.replace_input_with(0, second.inputs[0])
    return {**traced_parts, "controlnet": dataclasses.replace(control, model=model)}


def test_add_parts_with_a_wrong_graph_changes_nothing(parted, bundles, traced_parts, tmp_path, monkeypatch):
    for place, bundle in enumerate((bundles["fp16"], parted)):
        folder = tmp_path / str(place)
        shutil.copytree(bundle.path, folder)
        monkeypatch.setattr(adding, "trace_graphs", lambda *_: wrong(traced_parts))
        with pytest.raises(ParityError, match="controlnet: found a relative error") as caught:
            add_parts(folder)
        assert "unet_outer:" not in str(caught.value) or "unet_full:" in str(caught.value)
        assert Bundle.open(folder).manifest == bundle.manifest
        assert {path.name for path in folder.iterdir()} == {path.name for path in bundle.path.iterdir()}
        monkeypatch.setattr(adding, "trace_graphs", lambda *_: traced_parts)
        assert Bundle.open(add_parts(folder).path).manifest.graphs == parted.manifest.graphs


def test_bundle_with_parts_of_another_base_is_refused(parted, tmp_path):
    folder = shutil.copytree(parted.path, tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["graphs"]["unet_outer"]
    manifest["graphs"]["unet_full"]["inputs"][4]["shape"][1] = 17
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert (
        "graph unet_outer: found none; expected vae_encoder, controlnet_cond, denoiser, vae_decoder, controlnet"
        in str(caught.value)
    )
    assert "graph unet_full: found inputs" in str(caught.value)


def test_parts_command_reports_parity(bundles, traced_parts, tmp_path, monkeypatch):
    folder = shutil.copytree(bundles["fp16"].path, tmp_path / "bundle")
    monkeypatch.setattr(adding, "trace_graphs", lambda *_: traced_parts)
    result = CliRunner().invoke(main, ["parts", str(folder), "--json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["bundle"] == str(folder)
    assert set(report["parity"]) == set(UNET_SPLIT_GRAPHS)
    assert report["bytes"] == sum((folder / f"{name}.onnx").stat().st_size for name in UNET_SPLIT_GRAPHS)
    assert "comparing unet_outer" in result.stderr
    missing = CliRunner().invoke(main, ["parts", "nowhere"])
    assert missing.exit_code == 1
    assert "found no bundle 'nowhere'" in missing.stderr


def test_bundle_command_keeps_parts_and_adds_them_on_request(
    parted, bundles, traced, traced_parts, tmp_path, monkeypatch
):
    both = {**traced, **traced_parts}
    monkeypatch.setattr("lsast_export.bundle.export.trace_graphs", lambda _, names, *__: {n: both[n] for n in names})
    for name, source, options in (("kept", parted, []), ("new", bundles["fp16"], ["--parts"])):
        arguments = ["bundle", "--base", str(source.path), "--out", str(tmp_path / name), *options]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.stderr
        assert (tmp_path / name / "unet_full.onnx").read_bytes() == (parted.path / "unet_full.onnx").read_bytes()
    report = check_bundle(tmp_path / "new", "onnxruntime")
    assert report.passed
    assert set(UNET_SPLIT_GRAPHS) < report.figures.keys()
    refused = CliRunner().invoke(main, ["--style", "x", "--parts"])
    assert refused.exit_code == 2
    assert "found --parts, which belongs to a whole bundle" in refused.stderr
