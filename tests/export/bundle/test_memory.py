"""An export holds one network at a time: who has weights when, and which file is moved rather than copied."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lsast_engines.backends import onnxruntime as backend
from lsast_engines.backends.registry import open_engine
from lsast_engines.environment import peak_memory
from lsast_export.bundle import export as exporter
from lsast_export.bundle.export import WEIGHTS, ExportOptions, export_bundle
from lsast_export.graphs.modules import NETWORKS, base_on_meta
from lsast_export.graphs.trace import TracedGraph
from lsast_export.parity import torch_reference as reference
from lsast_export.parity.parity import ParityPlan
from lsast_export.parity.torch_reference import draw_inputs, run_torch
from lsast_export.styles.bake import KVProjector, bake_null_style, bake_style
from lsast_train.base.base import Base
from lsast_train.base.lazy_base import load_base, open_base


def in_memory(base: Base) -> set[str]:
    return {
        name
        for name in NETWORKS
        if any(weight.device.type != "meta" for weight in getattr(base, name).state_dict().values())
    }


def test_bake_style_reads_from_files_what_the_loaded_base_projects(bundles, prompts):
    bundle = bundles["fp16"]
    stored = open_base(bundle.path)
    networks = base_on_meta(stored)
    assert in_memory(networks) == set()
    whole = KVProjector.of_base(load_base(bundle.path))
    for projector in (KVProjector.of_base(networks, stored), KVProjector.of_bundle(bundle)):
        for baked, expected in (
            (bake_null_style(projector), bake_null_style(whole)),
            (bake_style(projector, prompts.prompts, "hand"), bake_style(whole, prompts.prompts, "hand")),
        ):
            np.testing.assert_array_equal(baked.kv_unet, expected.kv_unet)
            np.testing.assert_array_equal(baked.kv_control, expected.kv_control)
            assert baked.base == expected.base
    assert in_memory(networks) == set()


def test_run_torch_holds_one_network_at_a_time(bundles, monkeypatch):
    parts = open_base(bundles["fp32"].path)
    plan = ParityPlan()
    order = []
    real = reference.loaded

    @contextlib.contextmanager
    def watched(base: Base, parts: Any, name: str) -> Iterator[None]:
        assert in_memory(base) == set()
        with real(base, parts, name):
            assert in_memory(base) == {name}
            order.append(name)
            yield
        assert in_memory(base) == set()

    monkeypatch.setattr(reference, "loaded", watched)
    generator = np.random.default_rng(0)
    inputs = [draw_inputs(case, plan.loop, base_on_meta(parts), generator) for case in plan.cases]
    details: list[str] = []
    run_torch(parts, inputs, plan.loop, lambda phase, detail="": details.append(detail))
    steps = len(plan.loop.schedule(parts.config.noise).steps)
    assert order == ["autoencoder", *["controlnet", "unet"] * steps]
    told = [detail for detail in details if re.fullmatch(rf"step \d of {steps}, about \d+ s left", detail)]
    assert len(told) == steps


def test_export_bundle_moves_the_weight_file(base, traced, monkeypatch, tmp_path):
    written: list[int] = []
    real = exporter.save_graph

    def noted(graph: TracedGraph, weights: Path, path: Path) -> None:
        written.append(weights.stat().st_ino)
        real(graph, weights, path)

    monkeypatch.setattr(exporter, "save_graph", noted)
    bundle = export_bundle(base, tmp_path / "bundle", options=ExportOptions(storage_dtype="bf16"), traced=traced)
    assert {(bundle.path / "base.safetensors").stat().st_ino} == set(written)
    assert bundle.manifest.storage_dtype == "bf16"


def test_peak_memory_is_the_kernels_high_water_mark():
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("no /proc here")
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
    peak = peak_memory()
    assert abs(peak - int(kilobytes) * 1024) < 32 << 20


def test_large_16_bit_weights_stay_in_their_file(bundles, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    bundle = bundles["bf16"]
    halves = sum(t.nbytes for t in load_file(bundle.path / WEIGHTS).values() if t.dtype == torch.bfloat16)
    assert halves > 0

    left_out = []
    real = onnxruntime.InferenceSession

    def session(*arguments: Any, **named: Any) -> Any:
        left_out.append(named["disabled_optimizers"])
        return real(*arguments, **named)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    latent = np.random.default_rng(0).standard_normal((1, 4, 8, 16), dtype=np.float32)
    images = []
    for limit in (halves, halves - 1):
        monkeypatch.setattr(backend, "MAX_FOLDED_BYTES", limit)
        spec = bundle.manifest.graphs["vae_decoder"]
        with contextlib.closing(open_engine(bundle.graph_path("vae_decoder"), spec, "onnxruntime")) as engine:
            images.append(engine({"latent": latent})["image"].copy())
    assert left_out == [[], ["ConstantFolding"]]
    np.testing.assert_allclose(images[1], images[0], atol=1e-5)
