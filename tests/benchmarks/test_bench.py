"""`benchmarks/bench`: its statistics and sums against hand-made reports, and the whole of it on the embedded bundle."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from benchmarks.bench import measure as bench_measure
from benchmarks.bench.__main__ import main
from benchmarks.bench.peak_flops import matmul_graph, quantized_matmul_graph, spec
from benchmarks.bench.report import markdown
from lsast_engines.backends.registry import open_engine


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, with the embedded bundle as the default."""
    rooms = [str(Path(module.__file__).parents[1]) for module in (sys.modules["lsast"], sys.modules["lsast_engines"])]
    monkeypatch.setenv("PYTHONPATH", ":".join(rooms))
    monkeypatch.delenv("LSAST_BUNDLE", raising=False)
    monkeypatch.setenv("LSAST_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of matrices so small that they take no time; what they tell of the machine is not tested."""
    real = bench_measure.run_worker

    def run_worker(name: str, task: dict[str, Any], threads: int | None = None) -> Any:
        return real(name, {**task, "side": 32, "repeats": 1} if name == "peak_flops" else task, threads)

    monkeypatch.setattr(bench_measure, "run_worker", run_worker)


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_matmul_graphs_compute_the_product(tmp_path):
    onnx = pytest.importorskip("onnx")
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((48, 48), dtype=np.float32) for _ in range(2))
    product = left @ right
    for name, content in (("plain", matmul_graph(right)), ("quantized", quantized_matmul_graph(right))):
        onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        for backend in ("onnxruntime", "openvino"):
            engine = open_engine(path, spec(48), backend, threads=1)
            found = engine({"x": left})["y"].copy()
            engine.close()
            error = np.abs(found - product)
            if name == "plain":
                assert error.max() < 1e-4
            else:
                # Rounding errors are even in ± half a step, their variances s² / 12 add up over the sum of 48.
                steps = np.array([1 / 16, np.abs(right).max() / 127])
                deviation = np.sqrt(48 * (steps**2 / 12).sum())
                assert 0 < error.mean() < 1.5 * deviation


def test_bench_report_holds_warm_cold_and_limits(folder, small_products):
    result = _run(
        *("--backend", "onnxruntime", "--option", "guidance=1,2", "--option", "steps=4", "--option", "strength=0.5"),
        *("--sizes", "64", "--repeats", "2", "--cold", "--threads", "1", "--json", "-"),
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report.keys() == {"machine", "bundle", "threads", "repeats", "peak_flops", "rows", "notes", "load_at_end"}
    assert {"cpu", "cores", "flags", "versions", "load"} <= report["machine"].keys()
    assert report["machine"]["versions"]["numpy"] == np.__version__
    assert {"fp32", "int8"} <= set(report["peak_flops"])
    assert {"numpy", "onnxruntime", "openvino"} <= set(report["peak_flops"]["fp32"])
    assert all(rate > 0 for by in report["peak_flops"].values() for rate in by.values())
    assert (report["threads"], report["repeats"], report["notes"]) == (1, 2, [])
    assert Path(report["bundle"]).name == "mini"
    rows = report["rows"]
    assert [(row["options"]["guidance"], row["size"]) for row in rows] == [(1, 64), (2, 64)]
    for row in rows:
        warm, cold = row["warm"], row["cold"]
        assert warm["painted"] == [row["size"], row["size"]]
        assert (warm["options"]["steps"], warm["options"]["guidance"]) == (4, row["options"]["guidance"])
        assert warm["picture"]["n"] == cold["total"]["n"] == 2
        assert warm["step"]["n"] == 2 * 2  # the last half of four steps, twice
        assert {name: graph["run"]["n"] for name, graph in warm["graphs"].items()} == {
            "controlnet_cond": 2, "vae_encoder": 2, "denoiser": 4, "vae_decoder": 2,
        }  # fmt: skip
        assert list(warm["phases"]) == ["read", "edges", "encode", "denoise", "decode", "finish"]
        assert warm["peak_mb"] > 20
        assert {"interpreter", "imports", "import onnxruntime", "open bundle", "open denoiser"} <= cold["parts"].keys()
        assert {"denoiser: first run", "denoiser: further runs", "vae_decoder: first run"} <= cold["parts"].keys()
        assert sum(part["median"] for part in cold["parts"].values()) == pytest.approx(
            cold["total"]["median"], rel=1e-3
        )
        once = sum(warm["graphs"][name]["gmac"] for name in ("vae_encoder", "controlnet_cond", "vae_decoder"))
        assert warm["gmac"] == pytest.approx(2 * warm["graphs"]["denoiser"]["gmac"] + once)
        assert warm["fraction"] == pytest.approx(
            warm["gmac"] / warm["picture"]["median"] / max(report["peak_flops"]["fp32"].values())
        )
    tables = markdown(report)
    assert all(title in tables for title in ("The limit", "Pictures", "Graphs and phases", "A new process"))
    assert f"n = 2; median (spread); load of the machine at the beginning {report['machine']['load']:.2f}" in tables
