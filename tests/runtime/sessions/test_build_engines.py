"""`--build`: what is missing is compiled when that was allowed, and only then. No GPU: the driver is a fake that names
one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

import lsast
from lsast.cli.main import main
from lsast.sessions import build_engines as building
from lsast.sessions.build_engines import build_engines
from lsast_engines.backends.tensorrt import cuda
from lsast_engines.backends.tensorrt.engine import find_engine
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.errors import BackendError, MissingExtraError, UsageError

GPU = cuda.Gpu("Fake GPU", "8.9", 1 << 34)
CUDA = SimpleNamespace(
    cudaError_t=SimpleNamespace(cudaSuccess=0),
    cudaGetDeviceCount=lambda: (0, 1),
    cudaGetDeviceProperties=lambda _: (0, SimpleNamespace(name=b"Fake GPU", major=8, minor=9, totalGlobalMem=1 << 34)),
)


@pytest.fixture
def bundle(bundle_path: Path) -> Bundle:
    return Bundle.open(bundle_path)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of which only the version is asked."""
    monkeypatch.setattr(building, "load_library", lambda _: SimpleNamespace(__version__="1.7.1"))


def graphs(bundle: Bundle) -> list[str]:
    """What is compiled."""
    return list(bundle.manifest.graphs)


class Runner:
    """Takes the place of the compiler's process."""

    def __init__(self, status: int = 0) -> None:
        self.commands: list[list[str]] = []
        self.status = status

    def __call__(self, command: list[str]) -> int:
        self.commands.append(command)
        return self.status


def test_build_engines_runs_the_command_for_missing_engines_and_the_gpu(bundle: Bundle, library: None) -> None:
    run = Runner()
    assert build_engines(bundle, "tensorrt-rtx", "fp16", run, CUDA) == graphs(bundle)
    (command,) = run.commands
    assert command[1:4] == ["-m", "lsast_export", "compile"]
    assert command[4:11] == [str(bundle.path), "--backend", "tensorrt-rtx", "--compute-dtype", "fp16", "--sm", "8.9"]
    assert command[11:] == [part for name in graphs(bundle) for part in ("--graph", name)]


def test_build_engines_skips_engines_that_exist(bundle: Bundle, library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Runner()
    there = set(graphs(bundle))

    def find(path: Path, spec: Any, *key: Any) -> None:
        assert key == ("tensorrt", "1.7.1", "fp16", GPU)
        if spec.name not in there:
            raise BackendError("missing")

    monkeypatch.setattr(building, "find_engine", find)
    assert build_engines(bundle, "tensorrt", "fp16", run, CUDA) == []
    assert run.commands == []
    there.remove("vae_decoder")
    assert build_engines(bundle, "tensorrt", "fp16", run, CUDA) == ["vae_decoder"]
    assert run.commands[0][-2:] == ["--graph", "vae_decoder"]
    assert "--sm" not in run.commands[0]


def test_build_engines_with_a_failing_compiler_names_the_command(bundle: Bundle, library: None) -> None:
    with pytest.raises(BackendError, match=r"failed with exit status 3; run it by itself: lsast-export compile"):
        build_engines(bundle, "tensorrt-rtx", "fp16", Runner(3), CUDA)


@pytest.mark.parametrize("absent", ["lsast_export", "onnx_ir"])
def test_build_engines_without_the_exporter_names_the_extra(
    bundle: Bundle, library: None, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == absent else find(name, *rest))
    with pytest.raises(MissingExtraError, match=r"the exporter.*pip install 'lsast\[export\]'"):
        build_engines(bundle, "tensorrt-rtx", "fp16", Runner(), CUDA)


def test_build_engines_without_a_gpu_compiles_nothing(bundle: Bundle, library: None) -> None:
    nothing = SimpleNamespace(
        cudaError_t=CUDA.cudaError_t,
        cudaGetDeviceCount=lambda: (35, None),
        cudaGetErrorString=lambda code: (0, b"driver version is insufficient"),
    )
    run = Runner()
    with pytest.raises(
        BackendError, match=r"found no NVIDIA GPU to build engines of tensorrt-rtx for: .* \(35\); no NVIDIA"
    ):
        build_engines(bundle, "tensorrt-rtx", "fp16", run, nothing)
    assert run.commands == []


@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
def test_build_engines_for_a_backend_without_engines_raises(tmp_path: Path, bundle_path: Path, backend: str) -> None:
    with pytest.raises(UsageError, match=f"found a backend '{backend}' .*; expected tensorrt or tensorrt-rtx"):
        lsast.load(bundle_path, backend, build=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    arguments = [str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--bundle", str(bundle_path)]
    result = CliRunner().invoke(main, [*arguments, "--backend", backend, "--build"])
    assert result.exit_code == 2
    assert "expected tensorrt or tensorrt-rtx" in result.stderr


@pytest.mark.needs("tensorrt_rtx", "onnx_ir")
def test_compile_leaves_engines_that_fit(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With TensorRT-RTX itself, which compiles without a GPU."""
    import tensorrt_rtx as rtx

    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "home"))
    assert build_engines(bundle, "tensorrt-rtx", "fp32", runtime=CUDA) == graphs(bundle)
    for name, spec in bundle.manifest.graphs.items():
        path = bundle.graph_path(name)
        record = find_engine(path, spec, "tensorrt-rtx", str(rtx.__version__), "fp32", GPU)
        assert record.key.targets == ("8.9",)
    output = capfd.readouterr()
    assert output.out == ""
    assert "compiling denoiser" in output.err
    assert build_engines(bundle, "tensorrt-rtx", "fp32", Runner(1), CUDA) == []
