import contextlib
import dataclasses
import mmap
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lsast_engines.backends.base import Engine, import_library
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.bundle import EMBEDDED, Bundle
from lsast_engines.bundle.graph_spec import DENOISER, GraphSpec, TensorSpec
from lsast_engines.errors import BackendError

BACKENDS = ("openvino", "onnxruntime")
"""Those that run a graph file as it is, on any machine."""


@pytest.fixture(params=BACKENDS)
def engine(request: pytest.FixtureRequest, toy: Any) -> Iterator[Engine]:
    pytest.importorskip(request.param)
    engine = open_engine(toy.path, toy.spec, request.param, threads=1)
    yield engine
    engine.close()


def close_to(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == np.float32 for name in found)
    assert all(found[name].shape == expected[name].shape for name in found)
    return all(np.allclose(found[name], expected[name], rtol=1e-5, atol=1e-5) for name in found)


def test_engine_call_at_any_size_and_stride_computes_the_graph(engine, toy):
    assert (engine.backend in BACKENDS, engine.device, engine.spec) == (True, "cpu", toy.spec)
    for batch, length in ((2, 5), (1, 1), (3, 17), (2, 5), (4, 6)):
        feeds = toy.feeds(batch, length, seed=length)
        assert close_to(engine(feeds), toy.expected(feeds))
    feeds |= {"x": feeds["x"][::2, :, ::-1], "timestep": feeds["timestep"][::2], "scale": np.float32(1.5)}
    assert not feeds["x"].flags.c_contiguous
    assert close_to(engine(feeds), toy.expected(feeds))


def test_bind_inputs_keeps_copies_until_the_engine_is_closed_though_memory_is_released(engine, toy):
    bound, other = toy.feeds(seed=1), toy.feeds(seed=2)
    engine.bind_inputs({"scale": bound["scale"]})
    engine.bind_inputs({"timestep": bound["timestep"]})
    for seed in (3, 4, 5):
        x = toy.feeds(seed=seed)["x"]
        found = {name: value.copy() for name, value in engine({"x": x}).items()}
        assert close_to(found, toy.expected({**bound, "x": x}))
        engine.release_memory()
        for name, value in engine({"x": x}).items():
            np.testing.assert_array_equal(value, found[name])
    engine.bind_inputs({"timestep": other["timestep"]})
    assert close_to(engine({"x": x}), toy.expected({**bound, "timestep": other["timestep"], "x": x}))
    engine.bind_inputs({"x": x})  # now all inputs are bound
    expected = toy.expected({**bound, "timestep": other["timestep"], "x": x})
    x[:] = 0  # it was copied
    outputs = engine({})
    assert close_to(outputs, expected)
    engine.close()
    engine.close()
    assert close_to(outputs, expected)
    with pytest.raises(BackendError, match="graph toy is closed"):
        engine(toy.feeds())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
@pytest.mark.parametrize(("limit", "kept"), [(0, False), (1 << 40, True)])
def test_release_memory_of_a_large_bundle_gives_the_arena_back(toy, limit, kept, monkeypatch):
    onnxruntime = pytest.importorskip("lsast_engines.backends.onnxruntime")
    monkeypatch.setattr(onnxruntime, "MAX_WEIGHT_BYTES", limit)
    spec = dataclasses.replace(toy.spec, name=DENOISER)  # only what runs at every step has an arena
    # glibc keeps freed blocks of up to 32 MiB if the process freed such a one before (mallopt(3)): these are larger.
    small, large = toy.feeds(), toy.feeds(1, 4 << 20)
    with contextlib.closing(open_engine(toy.path, spec, "onnxruntime", threads=1)) as engine:
        engine(small)
        before = resident()
        expected = {name: value.copy() for name, value in engine(large).items()}
        engine.release_memory()
        arena = 16 * (4 << 20)  # W x in float32
        assert (resident() - before - sum(value.nbytes for value in expected.values()) > arena / 2) is kept
        for name, value in engine(large).items():
            np.testing.assert_array_equal(value, expected[name])


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_engine_call_with_wrong_inputs_lists_all_faults(engine, toy):
    feeds = toy.feeds(2, 5)
    wrong = {"x": feeds["x"].astype(np.float64), "timestep": feeds["timestep"][:1], "scales": feeds["scale"]}
    with pytest.raises(BackendError) as error:
        engine(wrong)
    assert str(error.value).split("\n  - ") == [
        "wrong inputs for graph toy:",
        "scales: unknown; expected x, timestep, scale",
        "scale: missing; expected scale float32 []",
        "x: found float64; expected float32",
        "timestep: found B = 1; expected 2, as in x",
    ]
    for name, value, words in (
        ("x", feeds["x"][:, :2], r"x: found shape \[2, 2, 5\]; expected \[B, 3, N\]"),
        ("x", feeds["x"][:, :, :0], r"x: found shape \[2, 3, 0\]"),
        ("scale", feeds["scale"][None], r"scale: found shape \[1\]; expected \[\]"),
    ):
        with pytest.raises(BackendError, match=words):
            engine({**feeds, name: value})
    with pytest.raises(BackendError, match=r"timestep: found int32; expected int64"):
        engine.bind_inputs({"timestep": feeds["timestep"].astype(np.int32)})
    assert close_to(engine(feeds), toy.expected(feeds))
    engine.bind_inputs({"scale": feeds["scale"]})
    with pytest.raises(BackendError, match="scale: is bound; bind it again to change it"):
        engine(feeds)


def test_engine_call_from_a_second_thread_is_refused(engine, toy, monkeypatch):
    inside, go_on = threading.Event(), threading.Event()
    run = type(engine)._run  # type: ignore[attr-defined]

    def slow(self: Any, feeds: Any) -> Any:
        inside.set()
        go_on.wait(10)
        return run(self, feeds)

    monkeypatch.setattr(type(engine), "_run", slow)
    feeds = toy.feeds()
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(engine(feeds)))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(BackendError, match="already running in another thread; expected one thread at a time"):
        engine(feeds)
    go_on.set()
    thread.join()
    assert close_to(results[0], toy.expected(feeds))


def test_engine_call_that_fails_names_the_graph(engine, toy, monkeypatch):
    def fail(self: Any, feeds: Any) -> Any:
        raise RuntimeError("out of registers")

    monkeypatch.setattr(type(engine), "_run", fail)
    with pytest.raises(BackendError, match=f"graph toy failed in {engine.backend} on cpu: out of registers"):
        engine(toy.feeds())


@pytest.mark.parametrize("backend", BACKENDS)
def test_check_interface_lists_all_differences(toy, backend):
    pytest.importorskip(backend)
    other = GraphSpec(
        "other",
        (
            TensorSpec("x", "float32", ("B", 4, "N")),
            TensorSpec("timestep", "float32", ("B",)),
            TensorSpec("strength", "float32", ()),
        ),
        (TensorSpec("y", "float32", ("B",)), TensorSpec("sum", "float32", ("B",))),
    )
    with pytest.raises(BackendError) as error:
        open_engine(toy.path, other, backend)
    assert str(error.value).split("\n  - ")[1:] == [
        "input scale: not in the spec",
        "input x: found float32 [?, 3, ?]; expected x float32 [B, 4, N]",
        "input timestep: found int64 [?]; expected timestep float32 [B]",
        "input strength: found none; expected strength float32 []",
        "output sum: found none; expected float32",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_check_interface_refuses_a_fixed_axis(toy, backend):
    pytest.importorskip(backend)
    model = onnx.load(toy.path)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 8
    onnx.save(model, toy.path)
    with pytest.raises(BackendError, match=r"input x: found float32 \[\?, 3, 8\]; expected x float32 \[B, 3, N\]"):
        open_engine(toy.path, toy.spec, backend)
    fixed = (TensorSpec("x", "float32", ("B", 3, 8)), *toy.spec.inputs[1:])
    outputs = (TensorSpec("y", "float32", ("B", 4, 8)), toy.spec.outputs[1])
    engine = open_engine(toy.path, dataclasses.replace(toy.spec, inputs=fixed, outputs=outputs), backend)
    feeds = toy.feeds(2, 8)
    assert close_to(engine(feeds), toy.expected(feeds))


@pytest.mark.parametrize("backend", BACKENDS)
def test_open_engine_of_a_damaged_file_is_refused(toy, backend):
    pytest.importorskip(backend)
    for damage in ((toy.path.parent / "toy.data").unlink, lambda: toy.path.write_bytes(b"no graph")):
        damage()
        with pytest.raises(BackendError, match=rf"{backend} cannot load .*toy.onnx on cpu|toy.onnx is not a graph of"):
            open_engine(toy.path, toy.spec, backend)
    toy.path.unlink()
    with pytest.raises(BackendError, match=r"found no graph file .*toy.onnx"):
        open_engine(toy.path, toy.spec, backend)


def test_openvino_computes_in_the_requested_dtype(product):
    openvino = pytest.importorskip("openvino")
    there = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    exact = product.x.astype(float) @ product.weight
    # Unless it is told, OpenVINO takes bf16 for a product of this width where the CPU has it, 1e-1 off.
    usual = open_engine(product.path, product.spec, "openvino")
    np.testing.assert_allclose(usual({"x": product.x})["y"], exact, atol=1e-4)
    for compute_dtype, capability, eps in (("bf16", "BF16", 2**-8), ("fp16", "FP16", 2**-11)):
        arguments: Any = {"backend": "openvino", "compute_dtype": compute_dtype}
        if capability not in there:
            with pytest.raises(BackendError, match=rf"cannot compute in {compute_dtype} on cpu here; available: fp32"):
                open_engine(product.path, product.spec, **arguments)
            continue
        engine = open_engine(product.path, product.spec, **arguments)
        error = np.abs(engine({"x": product.x})["y"] - exact).max() / np.abs(exact).max()
        assert engine.compute_dtype == compute_dtype
        assert eps / 64 < error < 4 * eps


SCRIPT = """
import time
from lsast_engines.backends.registry import open_engine
from lsast_engines.bundle.bundle import EMBEDDED, Bundle
bundle = Bundle.open(EMBEDDED)
for backend in ("onnxruntime", "openvino"):
    open_engine(bundle.graph_path("vae_decoder"), bundle.manifest.graphs["vae_decoder"], backend, threads=1)
time.sleep(2)  # ONNX Runtime looks up its collector after a while
"""


def test_open_engine_under_a_fresh_home_writes_no_file_and_looks_up_no_host(tmp_path):
    home, trace = tmp_path / "home", tmp_path / "trace"
    home.mkdir()
    hidden = {"CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HOME": str(home), "LSAST_HOME": str(tmp_path / "lsast"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    strace = ["strace", "-f", "-qq", "-o", str(trace), "-e", "trace=connect,sendto,sendmsg,sendmmsg"]
    traced = (
        shutil.which("strace") and not subprocess.run([*strace, "true"], capture_output=True, check=False).returncode
    )
    subprocess.run([*strace, *command] if traced else command, env=environment, check=True)
    assert not list(home.rglob("*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "lsast"] + ["trace"] * bool(traced)
    if traced:
        assert not [line for line in trace.read_text().splitlines() if "AF_INET" in line]


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        # as pybind11 reports an error of a module's initialisation
        ("ImportError('initialization failed') from KeyboardInterrupt()", KeyboardInterrupt, None),
        ("ImportError('initialization failed') from MemoryError()", MemoryError, None),
        ("ImportError('failed to map')", BackendError, r"onnxruntime is installed but cannot be imported \(fail"),
    ],
)
def test_open_engine_with_a_library_that_fails_takes_no_other(tmp_path, monkeypatch, raised, error, message):
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text(f"raise {raised}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    bundle = Bundle.open(EMBEDDED)
    with pytest.raises(error, match=message):
        open_engine(bundle.graph_path("vae_decoder"), bundle.manifest.graphs["vae_decoder"])


def test_import_library_of_a_folder_that_pip_left_raises_import_error(tmp_path, monkeypatch):
    (tmp_path / "lsast_left_behind").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="a folder without a library"):
        import_library("lsast_left_behind")


def test_import_library_keeps_the_users_choice_of_telemetry(monkeypatch):
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    import_library("json")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
