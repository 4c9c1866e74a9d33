"""A bundle small enough to be computed by hand: every graph is a few linear operations, built without torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lsast
from lsast.sampling.batch import Batch
from lsast.sampling.sampler import Networks, sample
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import Geometry, GraphSpec, UnetSplit, graph_specs, split_specs
from lsast_engines.bundle.manifest import AttentionLayer, Manifest
from lsast_engines.bundle.style import Style
from lsast_engines.diffusion import NoiseSchedule

GEOMETRY = Geometry(hint_channels=5, tokens=3, unet_width=24, control_width=16)
STAGES = 10
FINGERPRINT = "5a" * 32
LATENT_SCALE = 0.5


@dataclass(frozen=True)
class Weights:
    """The matrices of the tiny graphs; tests recompute the graphs from them in plain numpy."""

    encode_mean: np.ndarray
    encode_std: np.ndarray
    hint: np.ndarray
    unet: np.ndarray
    control: np.ndarray
    edges: np.ndarray
    time: np.ndarray
    decode: np.ndarray

    @classmethod
    def random(cls) -> Weights:
        rng = np.random.default_rng(7)

        def matrix(rows: int, columns: int, scale: float) -> np.ndarray:
            return (scale * rng.standard_normal((rows, columns))).astype(np.float32)

        return cls(
            encode_mean=matrix(4, 3, 1.0),
            encode_std=matrix(4, 3, 0.3),
            hint=matrix(5, 3, 1.0),
            unet=matrix(24, 4, 0.5),
            control=matrix(16, 4, 0.5),
            edges=matrix(4, 5, 1.0),
            time=matrix(1, 4, 0.3),
            decode=matrix(3, 4, 0.03),
        )


def _model(spec: GraphSpec, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> bytes:
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    borders = [
        [helper.make_tensor_value_info(tensor.name, types[tensor.dtype], list(tensor.shape)) for tensor in side]
        for side in (spec.inputs, spec.outputs)
    ]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, spec.name, *borders, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _convolution(matrix: np.ndarray) -> np.ndarray:
    return matrix[:, :, None, None]


@pytest.fixture(autouse=True)
def source_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a test starts find this source."""
    packages = [str(Path(__file__).parents[2] / name) for name in ("engines", "export", "runtime", "train")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*packages, os.environ.get("PYTHONPATH", "")]))


@pytest.fixture(scope="session")
def weights() -> Weights:
    return Weights.random()


@pytest.fixture(scope="session")
def graphs(weights: Weights) -> dict[str, bytes]:
    node = helper.make_node
    specs = graph_specs(GEOMETRY)
    pool = {"kernel_shape": [8, 8], "strides": [8, 8]}
    encoder = [
        node("AveragePool", ["image"], ["pooled"], **pool),
        node("Conv", ["pooled", "w_mean"], ["mean"]),
        node("Conv", ["pooled", "w_std"], ["spread"]),
        node("Abs", ["spread"], ["std"]),
    ]
    hint = [node("AveragePool", ["edges"], ["pooled"], **pool), node("Conv", ["pooled", "w"], ["hint"])]
    # eps[g, b] = latent[b] / 2 + U mean_T(kv_unet[g, b]) + scale * (E hint[b]) * (C mean_T(kv_control[b])) + t / 1000 v
    denoiser = [
        node("Mul", ["latent", "half"], ["z"]),
        node("ReduceMean", ["kv_unet", "axis2"], ["kv_unet_mean"], keepdims=0),
        node("MatMul", ["kv_unet_mean", "w_unet"], ["style"]),
        node("Unsqueeze", ["style", "axes34"], ["style_map"]),
        node("ReduceMean", ["kv_control", "axis1"], ["kv_control_mean"], keepdims=0),
        node("MatMul", ["kv_control_mean", "w_control"], ["gate"]),
        node("Unsqueeze", ["gate", "axes23"], ["gate_map"]),
        node("Conv", ["hint", "w_edges"], ["edge_map"]),
        node("Mul", ["edge_map", "gate_map"], ["gated"]),
        node("Mul", ["gated", "control_scale"], ["held"]),
        node("Cast", ["timestep"], ["timestep_float"], to=TensorProto.FLOAT),
        node("Div", ["timestep_float", "thousand"], ["time"]),
        node("Unsqueeze", ["time", "axis1"], ["time_column"]),
        node("MatMul", ["time_column", "w_time"], ["time_row"]),
        node("Unsqueeze", ["time_row", "axes23"], ["time_map"]),
        node("Add", ["z", "held"], ["z_held"]),
        node("Add", ["z_held", "time_map"], ["shared"]),
        node("Add", ["style_map", "shared"], ["eps"]),
    ]
    decoder = [
        node("Conv", ["latent", "w"], ["small"]),
        node("Resize", ["small", "", "scales"], ["image"], mode="nearest"),
    ]
    return {
        "vae_encoder": _model(
            specs["vae_encoder"],
            encoder,
            {"w_mean": _convolution(weights.encode_mean), "w_std": _convolution(weights.encode_std)},
        ),
        "controlnet_cond": _model(specs["controlnet_cond"], hint, {"w": _convolution(weights.hint)}),
        "denoiser": _model(
            specs["denoiser"],
            denoiser,
            {
                "half": np.float32(0.5),
                "thousand": np.float32(1000),
                "axis1": np.array([1]),
                "axis2": np.array([2]),
                "axes23": np.array([2, 3]),
                "axes34": np.array([3, 4]),
                "w_unet": weights.unet,
                "w_control": weights.control,
                "w_edges": _convolution(weights.edges),
                "w_time": weights.time,
            },
        ),
        "vae_decoder": _model(
            specs["vae_decoder"],
            decoder,
            {"w": _convolution(weights.decode), "scales": np.array([1, 1, 8, 8], np.float32)},
        ),
    }


PART_SPECS = split_specs(GEOMETRY, UnetSplit(residuals=((4, 0), (4, 1)), outer=1, feature=4))


@pytest.fixture(scope="session")
def part_graphs(weights: Weights) -> dict[str, bytes]:
    """The tiny denoiser in parts: what is coarse of what the edges hold goes the deep way, the rest the shallow one."""
    node = helper.make_node
    axes = {"axis1": np.array([1]), "axes23": np.array([2, 3]), "axes34": np.array([3, 4])}
    # residual_1[b] = pool(scale * (E hint[b]) * (C mean_T(kv_control[b]))), residual_0[b] = what the pool loses
    control = [
        node("Mul", ["latent", "zero"], ["no_latent"]),
        node("Cast", ["timestep"], ["timestep_float"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["timestep_float", "axes123"], ["timestep_map"]),
        node("Mul", ["timestep_map", "zero"], ["no_time"]),
        node("ReduceMean", ["kv_control", "axis1"], ["kv_control_mean"], keepdims=0),
        node("MatMul", ["kv_control_mean", "w_control"], ["gate"]),
        node("Unsqueeze", ["gate", "axes23"], ["gate_map"]),
        node("Conv", ["hint", "w_edges"], ["edge_map"]),
        node("Mul", ["edge_map", "gate_map"], ["gated"]),
        node("Mul", ["gated", "control_scale"], ["scaled"]),
        node("Sum", ["scaled", "no_latent", "no_time"], ["held"]),
        node("AveragePool", ["held"], ["residual_1"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Resize", ["residual_1", "", "scales"], ["coarse"], mode="nearest"),
        node("Sub", ["held", "coarse"], ["residual_0"]),
    ]
    way_out = [
        node("Mul", ["latent", "half"], ["z"]),
        node("Add", ["z", "residual_0"], ["z_held"]),
        node("Add", ["feature", "z_held"], ["eps"]),
    ]
    # feature[g, b] = U mean_T(kv_unet[g, b]) + t / 1000 v + residual_1[b], wide again
    deep = [
        node("ReduceMean", ["kv_unet", "axis2"], ["kv_unet_mean"], keepdims=0),
        node("MatMul", ["kv_unet_mean", "w_unet"], ["style"]),
        node("Unsqueeze", ["style", "axes34"], ["style_map"]),
        node("Cast", ["timestep"], ["timestep_float"], to=TensorProto.FLOAT),
        node("Div", ["timestep_float", "thousand"], ["time"]),
        node("Unsqueeze", ["time", "axis1"], ["time_column"]),
        node("MatMul", ["time_column", "w_time"], ["time_row"]),
        node("Unsqueeze", ["time_row", "axes23"], ["time_map"]),
        node("Resize", ["residual_1", "", "scales"], ["coarse"], mode="nearest"),
        node("Add", ["time_map", "coarse"], ["shared"]),
        node("Add", ["style_map", "shared"], ["feature"]),
        *way_out,
    ]
    shallow = [
        node("Cast", ["timestep"], ["timestep_float"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["timestep_float", "axes123"], ["timestep_map"]),
        node("Mul", ["timestep_map", "zero"], ["no_time"]),
        node("ReduceSum", ["kv_unet"], ["kv_sum"], keepdims=0),
        node("Mul", ["kv_sum", "zero"], ["no_style"]),
        *way_out[:-1],
        node("Sum", ["z_held", "no_time", "no_style"], ["z_outer"]),
        node("Add", ["feature", "z_outer"], ["eps"]),
    ]
    scales = np.array([1, 1, 2, 2], np.float32)
    zero = {"zero": np.float32(0), "axes123": np.array([1, 2, 3])}
    wide = {"scales": scales, **axes}
    return {
        "controlnet": _model(
            PART_SPECS["controlnet"],
            control,
            {**zero, **wide, "w_control": weights.control, "w_edges": _convolution(weights.edges)},
        ),
        "unet_full": _model(
            PART_SPECS["unet_full"],
            deep,
            {
                **wide,
                "axis2": np.array([2]),
                "half": np.float32(0.5),
                "thousand": np.float32(1000),
                "w_unet": weights.unet,
                "w_time": weights.time,
            },
        ),
        "unet_outer": _model(PART_SPECS["unet_outer"], shallow, {**zero, "half": np.float32(0.5)}),
    }


def _style(name: str, seed: int, stages: int = STAGES) -> Style:
    rng = np.random.default_rng(seed)
    # What a style file can hold, so that saving and loading give these very numbers.
    kv_unet = rng.standard_normal((stages, 3, 24)).astype(np.float16).astype(np.float32)
    kv_control = rng.standard_normal((stages, 3, 16)).astype(np.float16).astype(np.float32)
    return Style(name, FINGERPRINT, stages, 3, kv_unet, kv_control)


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    layers = [AttentionLayer(f"unet.{i}", "unet", "down", 8 * i, 4) for i in range(3)]
    layers += [AttentionLayer(f"control.{i}", "control", "mid", 8 * i, 4) for i in range(2)]
    return Manifest(
        name="tiny",
        family="tiny",
        fingerprint=FINGERPRINT,
        height=64,
        width=64,
        latent_scale=LATENT_SCALE,
        storage_dtype="fp32",
        noise=NoiseSchedule(),
        stages=STAGES,
        tokens=3,
        geometry=GEOMETRY,
        attention_layers=tuple(layers),
        graphs=graph_specs(GEOMETRY),
        defaults={
            "style": "vangogh",
            "steps": 10,
            "strength": 0.7,
            "guidance": 2.0,
            "control_scale": 1.0,
            "solver": "ddim",
            "size": 128,
        },
        lsast_version="0",
    )


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory, graphs: dict[str, bytes], manifest: Manifest) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    null = tmp_path_factory.mktemp("null") / "null.safetensors"
    _style("null", 0, stages=1).save(null)
    sources = {f"{name}.onnx": content for name, content in graphs.items()}
    Bundle.write(folder, manifest, {**sources, "null.safetensors": null})
    for seed, name in enumerate(("vangogh", "monet"), start=1):
        _style(name, seed).save(folder / "styles" / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="session")
def parted_path(
    tmp_path_factory: pytest.TempPathFactory,
    bundle_path: Path,
    graphs: dict[str, bytes],
    part_graphs: dict[str, bytes],
    manifest: Manifest,
) -> Path:
    """The tiny bundle with its denoiser in parts, too."""
    folder = tmp_path_factory.mktemp("parted") / "tiny"
    files = {f"{name}.onnx": content for name, content in {**graphs, **part_graphs}.items()}
    sources = {**files, "null.safetensors": bundle_path / "null.safetensors"}
    whole = dataclasses.replace(manifest, graphs={**manifest.graphs, **PART_SPECS})
    Bundle.write(folder, whole, {**sources, **{f"styles/{file.name}": file for file in bundle_path.glob("styles/*")}})
    return folder


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """A picture [96, 160, 3] with smooth areas and hard edges."""
    y, x = np.mgrid[0:96, 0:160]
    rgb = np.stack([x * 255 // 159, y * 255 // 95, (x + y) % 256], axis=-1).astype(np.uint8)
    rgb[24:72, 40:100] = (200, 60, 30)
    rgb[40:60, 110:150] = (20, 40, 220)
    return rgb


@dataclass
class Run:
    """One call of `sample`: what it was given, and the latents that it gave."""

    networks: Networks
    batch: Batch
    latents: np.ndarray


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Every call of `sample` by a stylizer, in order."""
    calls: list[Run] = []

    def recorded(networks: Networks, batch: Batch, callback: Any) -> tuple[np.ndarray, np.ndarray]:
        latents, pictures = sample(networks, batch, callback)
        calls.append(Run(networks, batch, latents))
        return latents, pictures

    monkeypatch.setattr("lsast.sampling.sampler.sample", recorded)
    return calls


@pytest.fixture(scope="module")
def stylizer(bundle_path: Path) -> Iterator[lsast.Stylizer]:
    """The tiny bundle, open on the first backend that is installed."""
    with lsast.load(bundle_path) as opened:
        yield opened
