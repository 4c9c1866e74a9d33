"""`--build`: what is missing is compiled when that was allowed, and only then. No GPU: the driver is a fake that names
one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lsast
from fake_gpu import FakeCuda, Status
from lsast.sessions import build_engines as building
from lsast.sessions.build_engines import build_engines
from lsast_engines.backends.tensorrt import cuda
from lsast_engines.backends.tensorrt.engine import find_engine
from lsast_engines.bundle.bundle import Bundle
from lsast_engines.errors import BackendError, UsageError

GPU = cuda.Gpu("Fake GPU", "8.9", 1 << 30)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A machine with a GPU, and a library of which only the version is asked."""
    fake = FakeCuda()
    monkeypatch.setattr(cuda, "load_cuda", lambda: fake)
    monkeypatch.setattr(building, "load_library", lambda _: SimpleNamespace(__version__="1.7.1"))
    return fake


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the compiler's process was asked for."""
    asked: list[list[str]] = []
    monkeypatch.setattr(building, "_run", asked.append)
    return asked


@pytest.fixture
def bundle(bundle_path: Path) -> Bundle:
    return Bundle.open(bundle_path)


def graphs(bundle: Bundle) -> list[str]:
    """What is compiled."""
    return list(bundle.manifest.graphs)


def test_build_engines_runs_the_command_for_missing_engines_and_the_gpu(bundle, driver, commands, monkeypatch):
    assert build_engines(bundle, "tensorrt-rtx", "fp16", graphs(bundle)) == graphs(bundle)
    (command,) = commands
    assert command[1:4] == ["-m", "lsast_export", "compile"]
    assert command[4:11] == [str(bundle.path), "--backend", "tensorrt-rtx", "--compute-dtype", "fp16", "--sm", "8.9"]
    assert command[11:] == [part for name in graphs(bundle) for part in ("--graph", name)]
    there = {*graphs(bundle)}

    def find(path: Path, spec: Any, *key: Any) -> None:
        assert key == ("tensorrt", "1.7.1", "fp16", GPU)
        if spec.name not in there:
            raise BackendError("missing")

    monkeypatch.setattr(building, "find_engine", find)
    assert build_engines(bundle, "tensorrt", "fp16", graphs(bundle)) == []
    there.remove("vae_decoder")
    assert build_engines(bundle, "tensorrt", "fp16", graphs(bundle)) == ["vae_decoder"]
    assert commands[1][-2:] == ["--graph", "vae_decoder"]
    assert "--sm" not in commands[1]


def test_load_builds_what_preset_and_options_run(split_path, driver, commands):
    parts = ["controlnet", "unet_full", "unet_outer"]
    for given, denoisers in (
        ({}, ["denoiser"]),
        ({"preset": "fast"}, parts),
        ({"options": {"cache_interval": 3}}, parts),
        ({"preset": "fast", "options": {"cache_interval": 1}}, ["denoiser"]),
    ):
        commands.clear()
        with pytest.raises(BackendError):  # the fake compiler wrote no engine
            lsast.load(split_path, "tensorrt-rtx", build=True, **given)
        (command,) = commands
        assert [name for name in command[12::2] if name[:3] != "vae"] == ["controlnet_cond", *denoisers]


def test_build_engines_with_a_failing_compiler_names_the_command(bundle, driver, monkeypatch):
    monkeypatch.setattr(building, "_run", lambda _: 3)
    with pytest.raises(BackendError, match=r"failed with exit status 3; run it by itself: lsast-export compile"):
        build_engines(bundle, "tensorrt-rtx", "fp16", graphs(bundle))


def test_build_engines_without_a_gpu_compiles_nothing(bundle, driver, commands):
    driver.driver = Status.cudaErrorInsufficientDriver
    with pytest.raises(
        BackendError, match=r"found no NVIDIA GPU to build engines of tensorrt-rtx for: .* \(35\); no NVIDIA"
    ):
        build_engines(bundle, "tensorrt-rtx", "fp16", graphs(bundle))
    assert commands == []


@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
def test_build_engines_for_a_backend_without_engines_raises(run, bundle_path, backend):
    with pytest.raises(UsageError, match=f"found a backend '{backend}' .*; expected tensorrt or tensorrt-rtx"):
        lsast.load(bundle_path, backend, build=True)
    result = run("in.png", "out.png", "--backend", backend, "--build")
    assert result.exit_code == 2
    assert "expected tensorrt or tensorrt-rtx" in result.stderr


@pytest.mark.needs("tensorrt_rtx", "onnx_ir")
def test_compile_leaves_engines_that_fit(bundle, monkeypatch, tmp_path, capfd):
    """With TensorRT-RTX itself, which compiles without a GPU."""
    import tensorrt_rtx as rtx

    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cuda, "load_cuda", FakeCuda)
    assert build_engines(bundle, "tensorrt-rtx", "fp32", graphs(bundle)) == graphs(bundle)
    for name, spec in bundle.manifest.graphs.items():
        path = bundle.graph_path(name)
        record = find_engine(path, spec, "tensorrt-rtx", str(rtx.__version__), "fp32", GPU)
        assert record.key.targets == ("8.9",)
    output = capfd.readouterr()
    assert output.out == ""
    assert "compiling denoiser" in output.err
    monkeypatch.setattr(building, "_run", lambda _: pytest.fail("compiled again"))
    assert build_engines(bundle, "tensorrt-rtx", "fp32", graphs(bundle)) == []
