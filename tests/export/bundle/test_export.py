"""What an exported bundle holds, and that a wrong graph leaves none."""

import dataclasses
import os
import re
import shutil
import sys

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file, save_file

from lsast_engines.backends.onnxruntime import GPU_SUFFIX
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import REQUIRED_GRAPHS, UNET_SPLIT_GRAPHS, graph_specs
from lsast_engines.errors import BundleError, ExportError, LsastError, ParityError, StyleError, UsageError
from lsast_export.bundle import export as exporter
from lsast_export.bundle.export import ExportOptions, export_bundle
from lsast_export.graphs.external_weights import save_graph
from lsast_export.graphs.gpu_graph import dtypes_in
from lsast_export.graphs.modules import geometry
from lsast_export.graphs.trace import TracedGraph, trace
from lsast_export.styles.bake import KVProjector, bake_style
from lsast_train.base.lazy_base import load_base


@pytest.mark.parametrize("storage_dtype", ["fp32", "fp16"])
def test_export_bundle_stores_each_weight_once(bundles, storage_dtype):
    bundle = bundles[storage_dtype]
    weights = load_file(bundle.path / "base.safetensors")
    kind = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16}[storage_dtype]
    referenced = set()
    for name in (*REQUIRED_GRAPHS, *UNET_SPLIT_GRAPHS):
        path = bundle.graph_path(name)
        assert path.stat().st_size < 300_000
        onnx.checker.check_model(str(path), full_check=True)
        # onnx's own reading of external data against safetensors' reading of the same file
        external = [t.name for t in onnx.load(path, load_external_data=False).graph.initializer if t.data_location]
        loaded = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
        for key in external:
            assert loaded[key].data_type == kind
            np.testing.assert_array_equal(onnx.numpy_helper.to_array(loaded[key]), weights[key])
        assert sum(t.ByteSize() for key, t in loaded.items() if key not in external) < 20_000
        referenced |= set(external)
    projections = {key for key in weights if ".attn" in key and (".to_k." in key or ".to_v." in key)}
    unused = {key for key in weights if key.split(".")[0] in ("unet", "controlnet", "autoencoder")} - referenced
    assert unused  # keys and values are inputs: the cross-attentions' projections are for training only
    assert unused <= projections


@pytest.mark.parametrize("storage_dtype", ["fp32", "fp16"])
def test_export_bundle_records_parity_in_the_manifest(bundles, storage_dtype):
    manifest = Bundle.open(bundles[storage_dtype].path).manifest
    graphs = {*REQUIRED_GRAPHS, *UNET_SPLIT_GRAPHS}
    assert set(manifest.parity) == {*graphs, "loop"}
    assert all(0 < error < 1e-5 for error in manifest.parity.values())
    assert set(manifest.graphs) == graphs
    assert manifest.graphs.items() >= graph_specs(manifest.geometry).items()
    assert manifest.source["torch"] == torch.__version__.split("+")[0] or manifest.source["torch"] == torch.__version__
    others = {"base.json", "base.safetensors", "null.safetensors"}
    assert set(manifest.files) == others | {f"{name}{suffix}" for name in graphs for suffix in (".onnx", GPU_SUFFIX)}


def test_export_bundle_writes_all_gpu_graphs_but_the_encoder_in_fp16(bundles):
    folder = bundles["fp32"].path
    halves = {name: "FLOAT16" in dtypes_in(folder / f"{name}{GPU_SUFFIX}") for name in REQUIRED_GRAPHS}
    assert halves == {name: name != "vae_encoder" for name in REQUIRED_GRAPHS}


def test_export_bundle_bakes_styles_with_rounded_weights(bundles, prompts):
    bundle = bundles["fp16"]
    style = bundle.style("hand")
    assert style.meta["variant"] == "step+layer"
    rounded = bake_style(KVProjector.of_base(load_base(bundle.path)), prompts.prompts, "hand")
    np.testing.assert_allclose(style.kv_unet, rounded.kv_unet, rtol=2**-10, atol=1e-4)
    assert bundle.manifest.defaults["style"] == "hand"


def test_export_bundle_over_a_bundle_keeps_its_default_style(base, bundles, traced, tmp_path):
    shutil.copytree(bundles["fp16"].path, out := tmp_path / "out")
    written = export_bundle(base, out, traced=traced)
    assert (list(written.styles()), written.manifest.defaults["style"]) == (["hand"], "hand")
    written.manifest.defaults["style"] = mix = "hand:0.5@up+hand@0-4"
    (out / "manifest.json").write_text(written.manifest.to_json())
    assert export_bundle(base, out, traced=traced).manifest.defaults["style"] == mix
    (out / "styles" / "hand.safetensors").unlink()
    assert export_bundle(base, out, traced=traced).manifest.defaults["style"] == "none"


def constant(value: ir.Value) -> np.ndarray:
    return value.const_value.numpy()


def wrong_graphs(traced: dict[str, TracedGraph]) -> dict[str, TracedGraph]:
    """The graphs with a denoiser whose noise levels are a little off."""
    denoiser = traced["denoiser"]
    model = denoiser.model.clone()
    (levels,) = [value for value in model.graph.initializers.values() if constant(value).size == 1000]
    levels.const_value = ir.tensor(constant(levels) * np.float32(0.999), name=levels.name)
    return {**traced, "denoiser": dataclasses.replace(denoiser, model=model)}


def test_export_bundle_with_a_wrong_graph_leaves_what_was_there(base, bundles, traced, tmp_path):
    before, out = bundles["fp16"], tmp_path / "bundle"
    shutil.copytree(before.path, out)
    seen = set()
    with pytest.raises(ParityError, match="denoiser: found a relative error") as caught:
        export_bundle(base, out, traced=wrong_graphs(traced), progress=lambda *_: seen.update(os.listdir(tmp_path)))
    assert "vae_encoder" not in str(caught.value)
    # What a killed export leaves has the name that the next one to write there removes (`scratch_folder`).
    assert len(seen) > 1
    assert all(re.fullmatch(r"\.lsast-[0-9a-f]{16}\.tmp", name) for name in seen - {"bundle"})
    assert os.listdir(tmp_path) == ["bundle"]
    opened = Bundle.open(out)
    assert (opened.manifest, list(opened.styles())) == (before.manifest, ["hand"])


def test_export_bundle_refuses_unfit_prompts_before_tracing(base, prompts, monkeypatch, tmp_path):
    monkeypatch.setattr(exporter, "trace_graphs", lambda *_, **__: pytest.fail("traced"))
    foreign = dataclasses.replace(prompts, base="1" * 64)
    with pytest.raises(StyleError, match="111111111111"):
        export_bundle(base, tmp_path / "new", [foreign])
    short = dataclasses.replace(prompts, name="short", prompts=prompts.prompts[:5])
    with pytest.raises(ExportError, match="short: 5 stages"):
        export_bundle(base, tmp_path / "new", [prompts, short])


def test_export_bundle_without_the_backend_fails_before_tracing(base, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(exporter, "trace_graphs", lambda *_, **__: pytest.fail("traced"))
    with pytest.raises(LsastError, match=r"onnxruntime is not installed.*lsast\[cpu\]"):
        export_bundle(base, tmp_path / "new", options=ExportOptions(backend="onnxruntime"))


def test_trace_refuses_another_interface(base):
    class Squeezed(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return image[:, :1, ::8, ::8], image.mean(dim=(2, 3))

    spec = graph_specs(geometry(base))["vae_encoder"]
    with pytest.raises(ExportError) as caught:
        trace(Squeezed().eval(), spec, 64, 8)
    assert "output mean: found float32 [" in str(caught.value)
    assert "output std: found float32 [" in str(caught.value)
    assert "expected std float32 [B, 4, h, w]" in str(caught.value)


def test_trace_of_an_operator_without_onnx_function_decomposes_it(base):
    class Other(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            cells = torch.cat([image, image[:, :1]], 1)[:, :, ::8, ::8]
            return torch.rsub(cells, cells.exp()), torch.nn.functional.cosine_similarity(cells, cells + 1, -1)[
                ..., None
            ]

    spec = graph_specs(geometry(base))["vae_encoder"]
    mean, std = spec.outputs
    spec = dataclasses.replace(spec, outputs=(mean, dataclasses.replace(std, shape=("B", 4, "h", 1))))
    model = ir.serde.serialize_model(trace(Other().eval(), spec, 64, 8).model)
    image = torch.rand(1, 3, 64, 192)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": image.numpy()})
    for ours, expected in zip(found, Other()(image), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_save_graph_names_a_weight_that_is_not_stored(traced, bundles, tmp_path):
    tensors = load_file(bundles["fp32"].path / "base.safetensors")
    gone = tensors.pop("controlnet.controlnet_cond_embedding.conv_in.bias")
    save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(ExportError, match=rf"conv_in.bias: found nothing .* expected F32, F16 or BF16 \[{gone.size}\]"):
        save_graph(traced["controlnet_cond"], tmp_path / "base.safetensors", tmp_path / "controlnet_cond.onnx")


def test_export_bundle_refuses_an_output_in_the_way_before_any_work(base, tmp_path):
    (tmp_path / "file").write_text("kept")
    for out, error in ((tmp_path / "file", BundleError), (tmp_path / "file" / "out", UsageError)):
        with pytest.raises(error, match=r"expected a folder that can be made|exists and is not a bundle"):
            export_bundle(base, out, progress=lambda phase: pytest.fail(phase))
    assert (tmp_path / "file").read_text() == "kept"
