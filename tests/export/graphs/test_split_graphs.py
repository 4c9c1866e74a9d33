"""The split graphs: against the whole denoiser, and against torch where they leave something out."""

import dataclasses
import json
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lsast_engines.bundle.bundle import Bundle
from lsast_engines.errors import BundleError, ParityError
from lsast_export.bundle.export import export_bundle
from lsast_export.quantize.options import QuantizeOptions
from lsast_export.quantize.quantize import quantize_bundle
from lsast_train.base.attention import layer_contexts, project_contexts
from lsast_train.base.lazy_base import load_base

Run = Callable[..., dict[str, np.ndarray]]


@pytest.fixture
def split_bundle(bundles):
    return bundles["fp16"]


def split(
    inputs: dict[str, np.ndarray], run: Run, bundle: Bundle, backend: str = "onnxruntime"
) -> dict[str, np.ndarray]:
    """What `controlnet`, then `unet_full`, give for the inputs of a denoiser; with what the graphs go on with."""
    residuals = run(bundle, "controlnet", backend=backend, **inputs)
    return {**residuals, **run(bundle, "unet_full", backend=backend, **inputs, **residuals)}


@pytest.mark.parametrize(
    ("backend", "shape"),
    [("onnxruntime", (3, 2, 8, 8)), ("onnxruntime", (1, 1, 24, 8)), ("openvino", (3, 2, 24, 8))],
)
def test_split_graphs_in_sequence_match_the_denoiser(split_bundle, run, feeds, shape, backend):
    inputs = feeds(split_bundle, *shape)
    whole = run(split_bundle, "denoiser", backend=backend, **inputs)["eps"]
    found = split(inputs, run, split_bundle, backend)
    np.testing.assert_allclose(found["eps"], whole, rtol=0, atol=2e-6 * np.abs(whole).max())
    again = run(split_bundle, "unet_outer", backend=backend, **inputs, **found)["eps"]
    np.testing.assert_allclose(again, found["eps"], rtol=0, atol=1e-6 * np.abs(whole).max())


def test_quantized_split_graphs_match_the_quantized_denoiser(split_bundle, run, feeds, tmp_path):
    quantized = quantize_bundle(split_bundle, tmp_path / "int8", QuantizeOptions(pictures=1, size=64, target=0))
    inputs = feeds(split_bundle, 2, 1, 8, 8)
    expected, whole = (run(bundle, "denoiser", **inputs)["eps"] for bundle in (split_bundle, quantized))
    found = split(inputs, run, quantized)

    def distance(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.sqrt(np.mean((one - other) ** 2)))

    # A last bit may round the other way, and go on through all layers behind it.
    assert distance(found["eps"], whole) < distance(whole, expected) / 3
    again = run(quantized, "unet_outer", **inputs, **found)["eps"]
    assert distance(again, found["eps"]) < distance(whole, expected) / 3


def test_unet_outer_on_a_cached_feature_matches_torch(split_bundle, run, feeds):
    """diffusers' own U-Net at the next step, but that its last up block takes from below what it took before."""
    before, now = (feeds(split_bundle, 2, 1, 8, 16, seed) for seed in (1, 2))
    source = load_base(split_bundle.path)
    contexts = torch.randn(
        2, 3, split_bundle.manifest.tokens, source.context_dim, generator=torch.Generator().manual_seed(3)
    )
    for inputs in (before, now):
        with torch.no_grad():
            inputs["kv_unet"] = project_contexts(source.unet, contexts)[None].numpy()
    found = split(before, run, split_bundle)
    eps = run(split_bundle, "unet_outer", **now, **found)["eps"][0]

    residuals = [torch.from_numpy(found[tensor.name]) for tensor in split_bundle.manifest.graphs["controlnet"].outputs]
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
    fresh = split(now, run, split_bundle)["eps"][0]
    assert np.abs(fresh - expected).max() > 1e-3, "a feature that does not matter proves nothing"


def test_export_bundle_with_a_wrong_split_graph_writes_nothing(base, traced, tmp_path):
    """A ControlNet that gives a residual of the wrong place."""
    model = traced["controlnet"].model.clone()
    first, second = model.graph.outputs[0].producer(), model.graph.outputs[1].producer()
    first.replace_input_with(0, second.inputs[0])
    wrong = {**traced, "controlnet": dataclasses.replace(traced["controlnet"], model=model)}
    with pytest.raises(ParityError, match="controlnet: found a relative error"):
        export_bundle(base, tmp_path / "bundle", traced=wrong)
    assert not list(tmp_path.glob("bundle*"))


def test_bundle_with_split_graphs_of_another_base_is_refused(split_bundle, tmp_path):
    folder = shutil.copytree(split_bundle.path, tmp_path / "bundle")
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
