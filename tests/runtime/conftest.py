"""A bundle small enough to be computed by hand: every graph is a few linear operations, built without torch."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import lsast
from lsast.cli.main import main
from lsast.sampling.batch import Batch
from lsast.sampling.networks import Networks
from lsast.sampling.sampler import sample
from lsast_engines.backends.registry import available_backends
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import (
    VAE_DECODER_TINY,
    Geometry,
    GraphSpec,
    UnetSplit,
    graph_specs,
    split_specs,
    tiny_decoder_spec,
)
from lsast_engines.bundle.manifest import AttentionLayer, Manifest
from lsast_engines.bundle.style import Style
from lsast_engines.diffusion import NoiseSchedule

GEOMETRY = Geometry(hint_channels=5, tokens=3, unet_width=24, control_width=16)
STAGES = 10
FINGERPRINT = "5a" * 32
LATENT_SCALE = 0.5


MATRICES = {
    "encode_mean": (4, 3, 1.0),
    "encode_std": (4, 3, 0.3),
    "hint": (5, 3, 1.0),
    "unet": (24, 4, 0.5),
    "control": (16, 4, 0.5),
    "edges": (4, 5, 1.0),
    "time": (1, 4, 0.3),
    "decode": (3, 4, 0.03),
}
"""Rows, columns and scale of the matrices of the tiny graphs."""


@pytest.fixture(scope="session")
def weights() -> SimpleNamespace:
    """The matrices of the tiny graphs; tests recompute the graphs from them in plain numpy."""
    rng = np.random.default_rng(7)
    return SimpleNamespace(**{
        name: (scale * rng.standard_normal((rows, columns))).astype(np.float32)
        for name, (rows, columns, scale) in MATRICES.items()
    })  # fmt: skip


@pytest.fixture(autouse=True)
def source_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a test starts find this source."""
    packages = [str(Path(__file__).parents[2] / name) for name in ("engines", "eval", "export", "runtime", "train")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*packages, os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program with arguments in a process of its own."""

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    return run


node = helper.make_node
POOL = {"kernel_shape": [8, 8], "strides": [8, 8]}
# Parts of the denoiser: style_map = U mean_T(kv_unet[g, b])
STYLE = [
    node("ReduceMean", ["kv_unet", "axis2"], ["kv_unet_mean"], keepdims=0),
    node("MatMul", ["kv_unet_mean", "unet"], ["style"]),
    node("Unsqueeze", ["style", "axes34"], ["style_map"]),
]
# held = scale * (E hint[b]) * (C mean_T(kv_control[b]))
CONTROL = [
    node("ReduceMean", ["kv_control", "axis1"], ["kv_control_mean"], keepdims=0),
    node("MatMul", ["kv_control_mean", "control"], ["gate"]),
    node("Unsqueeze", ["gate", "axes23"], ["gate_map"]),
    node("Conv", ["hint", "edges_1x1"], ["edge_map"]),
    node("Mul", ["edge_map", "gate_map"], ["gated"]),
    node("Mul", ["gated", "control_scale"], ["held"]),
]
# time_map = t / 1000 v
TIME = [
    node("Cast", ["timestep"], ["timestep_float"], to=TensorProto.FLOAT),
    node("Div", ["timestep_float", "thousand"], ["time_share"]),
    node("Unsqueeze", ["time_share", "axis1"], ["time_column"]),
    node("MatMul", ["time_column", "time"], ["time_row"]),
    node("Unsqueeze", ["time_row", "axes23"], ["time_map"]),
]
HALF = [node("Mul", ["latent", "half"], ["z"])]
HALF_AND_FINE = [*HALF, node("Add", ["z", "residual_0"], ["z_held"])]
COARSE = node("Resize", ["residual_1", "", "twice"], ["coarse"], mode="nearest")

NODES = {
    "vae_encoder": [
        node("AveragePool", ["image"], ["pooled"], **POOL),
        node("Conv", ["pooled", "encode_mean_1x1"], ["mean"]),
        node("Conv", ["pooled", "encode_std_1x1"], ["spread"]),
        node("Abs", ["spread"], ["std"]),
    ],
    "controlnet_cond": [
        node("AveragePool", ["edges"], ["pooled"], **POOL),
        node("Conv", ["pooled", "hint_1x1"], ["hint"]),
    ],
    # eps[g, b] = latent[b] / 2 + style_map + held + time_map
    "denoiser": [*STYLE, *CONTROL, *TIME, *HALF, node("Sum", ["style_map", "z", "held", "time_map"], ["eps"])],
    "vae_decoder": [
        node("Conv", ["latent", "decode_1x1"], ["small"]),
        node("Resize", ["small", "", "eightfold"], ["image"], mode="nearest"),
    ],
    # The split graphs: what is coarse of what the edges hold goes the deep way, the rest the shallow one.
    "controlnet": [
        *CONTROL,
        node("AveragePool", ["held"], ["residual_1"], kernel_shape=[2, 2], strides=[2, 2]),
        COARSE,
        node("Sub", ["held", "coarse"], ["residual_0"]),
    ],
    # feature[g, b] = style_map + time_map + residual_1[b], wide again
    "unet_full": [
        *STYLE,
        *TIME,
        COARSE,
        node("Sum", ["style_map", "time_map", "coarse"], ["feature"]),
        *HALF_AND_FINE,
        node("Add", ["feature", "z_held"], ["eps"]),
    ],
    "unet_outer": [*HALF_AND_FINE, node("Add", ["feature", "z_held"], ["eps"])],
}
NODES["vae_decoder_tiny"] = NODES["vae_decoder"]


def _model(spec: GraphSpec, weights: SimpleNamespace) -> bytes:
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    borders = [
        [helper.make_tensor_value_info(tensor.name, types[tensor.dtype], list(tensor.shape)) for tensor in side]
        for side in (spec.inputs, spec.outputs)
    ]
    constants: dict[str, Any] = {
        **vars(weights),
        **{f"{name}_1x1": matrix[:, :, None, None] for name, matrix in vars(weights).items()},
        **{f"axis{axis}": np.array([axis]) for axis in (1, 2)},
        **{f"axes{axes}": np.array([int(axis) for axis in axes]) for axes in ("23", "34")},
        **{name: np.float32(value) for name, value in {"half": 0.5, "thousand": 1000}.items()},
        **{name: np.array([1, 1, n, n], np.float32) for name, n in {"twice": 2, "eightfold": 8}.items()},
    }
    used = {name for each in NODES[spec.name] for name in each.input} - {tensor.name for tensor in spec.inputs}
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used]
    graph = helper.make_graph(NODES[spec.name], spec.name, *borders, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


@pytest.fixture(scope="session")
def graphs(weights: SimpleNamespace) -> dict[str, bytes]:
    return {name: _model(spec, weights) for name, spec in graph_specs(GEOMETRY).items()}


PART_SPECS = split_specs(GEOMETRY, UnetSplit(residuals=((4, 0), (4, 1)), outer=1, feature=4))


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
def split_path(
    tmp_path_factory: pytest.TempPathFactory,
    bundle_path: Path,
    graphs: dict[str, bytes],
    weights: SimpleNamespace,
    manifest: Manifest,
) -> Path:
    """The tiny bundle with the split graphs, too, and with a small decoder that swaps red and blue."""
    folder = tmp_path_factory.mktemp("split") / "tiny"
    specs = {**PART_SPECS, VAE_DECODER_TINY: tiny_decoder_spec(GEOMETRY)}
    swapped = SimpleNamespace(**{**vars(weights), "decode": weights.decode[::-1].copy()})
    parts = {name: _model(spec, swapped if name == VAE_DECODER_TINY else weights) for name, spec in specs.items()}
    sources: dict[str, Path | bytes] = {f"{name}.onnx": content for name, content in {**graphs, **parts}.items()}
    sources |= {str(file.relative_to(bundle_path)): file for file in bundle_path.rglob("*.safetensors")}
    Bundle.write(folder, dataclasses.replace(manifest, graphs={**manifest.graphs, **specs}), sources)
    return folder


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """A picture [96, 160, 3] with smooth areas and hard edges."""
    y, x = np.mgrid[0:96, 0:160]
    rgb = np.stack([x * 255 // 159, y * 255 // 95, (x + y) % 256], axis=-1).astype(np.uint8)
    rgb[24:72, 40:100] = (200, 60, 30)
    rgb[40:60, 110:150] = (20, 40, 220)
    return rgb


@pytest.fixture
def folder(tmp_path: Path, photo: np.ndarray, bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with in.png; the tiny bundle is the default."""
    Image.fromarray(photo).save(tmp_path / "in.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LSAST_BUNDLE", str(bundle_path))
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Callable[..., Result]:
    """`lsast-run` in that folder, called with its arguments."""
    return lambda *arguments, **settings: CliRunner().invoke(main, arguments, **settings)


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


@pytest.fixture(scope="module", params=sorted(available_backends()))
def split_stylizer(request: pytest.FixtureRequest, split_path: Path) -> Iterator[lsast.Stylizer]:
    """The tiny bundle with the split graphs, open on each backend that is installed."""
    with lsast.load(split_path, backend=request.param) as opened:
        yield opened


@pytest.fixture
def terminal() -> Iterator[tuple[int, Callable[[], bytes]]]:
    """A terminal for a process' stderr, and a function that reads what is shown on it; empty when the other end is
    closed."""
    import fcntl
    import struct
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # tqdm draws nothing without lines
    opened = [ours, theirs]

    def shown() -> bytes:
        if theirs in opened:
            opened.remove(theirs)
            os.close(theirs)
        try:
            return os.read(ours, 1024)
        except OSError:
            return b""

    yield theirs, shown
    for descriptor in opened:
        os.close(descriptor)
