"""A toy base of small widths: its manifest, styles and bundle, and a graph that both backends can run."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from lsast_engines.bundle.bundle import Bundle
from lsast_engines.bundle.graph_spec import Geometry, GraphSpec, TensorSpec, graph_specs
from lsast_engines.bundle.manifest import AttentionLayer, Manifest
from lsast_engines.bundle.style import Style
from lsast_engines.diffusion import NoiseSchedule

FINGERPRINT = "ab" * 32
GEOMETRY = Geometry(hint_channels=5, tokens=3, unet_width=20, control_width=8)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the user's own bundles and styles out of the tests."""
    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LSAST_BUNDLE", raising=False)


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        name="toy",
        family="mini",
        fingerprint=FINGERPRINT,
        height=256,
        width=512,
        latent_scale=0.18215,
        storage_dtype="fp16",
        noise=NoiseSchedule(),
        stages=10,
        tokens=GEOMETRY.tokens,
        geometry=GEOMETRY,
        attention_layers=(
            AttentionLayer("down_blocks.0.attn2", "unet", "down", 0, 4),
            AttentionLayer("up_blocks.0.attn2", "unet", "up", 8, 6),
            AttentionLayer("mid_block.attn2", "control", "mid", 0, 4),
        ),
        graphs=graph_specs(GEOMETRY),
        defaults={
            "style": "a",
            "steps": 12,
            "strength": 0.7,
            "guidance": 3.0,
            "control_scale": 1.0,
            "solver": "unipc",
            "size": 512,
        },
        lsast_version="0.1.0",
        parity={"denoiser": 1e-6},
        source={"torch": "2.6"},
    )


@pytest.fixture
def make_style() -> Callable[..., Style]:
    def make(name: str = "a", base: str = FINGERPRINT, stages: int = 10, tokens: int = 3, width: int = 20) -> Style:
        rng = np.random.default_rng(len(name))
        unet = rng.standard_normal((stages, tokens, width)).astype(np.float32)
        control = rng.standard_normal((stages, tokens, 8)).astype(np.float32)
        return Style(name, base, stages, tokens, unet, control, {"licence": "CC0", "steps": "600"})

    return make


@pytest.fixture
def sources(tmp_path: Path, make_style: Callable[..., Style]) -> dict[str, Path | bytes]:
    """Every file of a bundle; one of them a path."""
    make_style("null", stages=1).save(tmp_path / "sources" / "null")
    make_style("a").save(tmp_path / "sources" / "a")
    (tmp_path / "sources" / "weights").write_bytes(bytes(range(256)))
    graphs: dict[str, Path | bytes] = {f"{name}.onnx": f"graph {name}".encode() for name in graph_specs(GEOMETRY)}
    return graphs | {
        "base.safetensors": tmp_path / "sources" / "weights",
        "null.safetensors": tmp_path / "sources" / "null",
        "styles/a.safetensors": tmp_path / "sources" / "a",
    }


@pytest.fixture
def bundle(tmp_path: Path, manifest: Manifest, sources: dict[str, Path | bytes]) -> Bundle:
    return Bundle.write(tmp_path / "toy", manifest, sources)


SPEC = GraphSpec(
    "toy",
    (
        TensorSpec("x", "float32", ("B", 3, "N")),
        TensorSpec("timestep", "int64", ("B",)),
        TensorSpec("scale", "float32", ()),
    ),
    (TensorSpec("y", "float32", ("B", 4, "N")), TensorSpec("total", "float32", ("B",))),
)


class ToyGraph:
    """y = scale · W x + timestep, total = sum of y over channels and N; W [4, 3] fp16 lies in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "toy.onnx"
        self.spec = SPEC
        self.weight = np.random.default_rng(7).standard_normal((4, 3)).astype(np.float16)
        # A node, not an initializer: ONNX Runtime refuses axes in external data.
        text = """toy (float[B, 3, N] x, int64[B] timestep, float scale) => (float[B, 4, N] y, float[B] total) {
            axes = Constant <value = int64[2] {1, 2}> ()
            W32 = Cast <to = 1> (W)
            Wx = MatMul (W32, x)
            scaled = Mul (Wx, scale)
            t32 = Cast <to = 1> (timestep)
            t = Unsqueeze (t32, axes)
            y = Add (scaled, t)
            total = ReduceSum <keepdims = 0> (y, axes)
        }"""
        _save(self.path, text, self.weight)

    def feeds(self, batch: int = 2, length: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {
            "x": rng.standard_normal((batch, 3, length)).astype(np.float32),
            "timestep": rng.integers(0, 1000, batch),
            "scale": np.array(rng.uniform(0.5, 2), np.float32),
        }

    def expected(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        y = feeds["scale"] * (self.weight.astype(np.float64) @ feeds["x"]) + feeds["timestep"][:, None, None]
        return {"y": y, "total": y.sum(axis=(1, 2))}


@pytest.fixture
def product(tmp_path: Path) -> SimpleNamespace:
    """y = x W; W [64, 64] fp16 lies in a file of its own. `x` [3, 64] are inputs."""
    path = tmp_path / "graphs" / "product.onnx"
    path.parent.mkdir()
    sides = [TensorSpec(name, "float32", ("N", 64)) for name in "xy"]
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((3, 64)).astype(np.float32), rng.standard_normal((64, 64)).astype(np.float16)
    text = "product (float[N, 64] x) => (float[N, 64] y) { W32 = Cast <to = 1> (W) y = MatMul (x, W32) }"
    _save(path, text, weight)
    return SimpleNamespace(path=path, spec=GraphSpec("product", (sides[0],), (sides[1],)), x=x, weight=weight)


def _save(path: Path, text: str, weight: np.ndarray) -> None:
    """Write the graph `text` (onnx.parser), whose weight W lies beside it in a file of data."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> {text}')
    model.graph.initializer.append(numpy_helper.from_array(weight, "W"))
    location = path.with_suffix(".data").name
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)


@pytest.fixture
def toy(tmp_path: Path) -> ToyGraph:
    return ToyGraph(tmp_path)
