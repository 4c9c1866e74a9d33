"""Compiled engines: their records, where what was changed or does not fit is named, and the shapes they are for."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fake_gpu import write_engine
from lsast_engines.backends.base import output_shapes
from lsast_engines.backends.tensorrt.engine_record import (
    EngineKey,
    Range,
    ShapeRanges,
    check_profile,
    engine_folder,
    graph_digest,
    record_path,
    verified_record,
)
from lsast_engines.bundle.bundle import EMBEDDED, Bundle
from lsast_engines.bundle.graph_spec import Geometry, UnetSplit, graph_specs, split_specs
from lsast_engines.errors import BackendError, UsageError

GEOMETRY = Geometry(hint_channels=6, tokens=8, unet_width=40, control_width=16)
SPECS = graph_specs(GEOMETRY)


def a_key(**changes: Any) -> EngineKey:
    key = EngineKey(
        graph="denoiser",
        onnx="a" * 64,
        profile=ShapeRanges().profile(SPECS["denoiser"]),
        compute_dtype="fp16",
        library="tensorrt-rtx",
        library_version="1.7.1",
        targets=("8.9", "12.0"),
    )
    return dataclasses.replace(key, **changes)


def an_engine(folder: Path, name: str = "denoiser", content: bytes = b"compiled" * 9) -> Path:
    graph, key = folder / "graph.onnx", a_key()
    graph.touch()
    return write_engine(graph, SPECS[name], folder, key.library, content=content, onnx=key.onnx, targets=key.targets)


def test_key_differences_name_every_field():
    assert a_key().differences(a_key()) == []
    for field in dataclasses.fields(EngineKey):
        (fault,) = a_key().differences(a_key(**{field.name: "other"}))
        assert fault.startswith(f"{field.name}: found other; expected ")


def test_unsupported_reasons_name_target_and_gpu():
    assert a_key().unsupported_reasons("12.0", "anything") == []
    assert a_key().unsupported_reasons("8.6", "anything") == ["targets: found 8.9, 12.0; expected 8.6, the GPU's"]
    portable = a_key(targets=("portable",))
    supported = {name: not portable.unsupported_reasons(name, "") for name in ("7.5", "8.0", "8.6", "9.0", "12.1")}
    assert supported == {"7.5": False, "8.0": False, "8.6": True, "9.0": False, "12.1": True}
    timed = a_key(library="tensorrt", targets=("8.9",), gpu="NVIDIA L4")
    assert timed.unsupported_reasons("8.9", "NVIDIA L40S") == ["gpu: found NVIDIA L4; expected NVIDIA L40S"]


def test_verified_record_keeps_all_fields_and_refuses_a_changed_engine(tmp_path):
    engine, other = an_engine(tmp_path), an_engine(tmp_path, "vae_decoder", b"another!" * 9)
    record = verified_record(engine)
    assert (record.key, record.bytes, record.seconds) == (a_key(), 72, 41.6)
    whole = engine.read_bytes()
    of_the_same_size = (whole[:-1] + b"!", other.read_bytes())
    for content, message in ((whole[:-1], "bytes: found 71; expected 72"), *((c, "SHA-256") for c in of_the_same_size)):
        engine.write_bytes(content)
        with pytest.raises(BackendError, match=message):
            verified_record(engine)
    engine.unlink()
    with pytest.raises(BackendError, match="found no engine"):
        verified_record(engine)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data | {"format": 3}, "has format 3; this version reads 4"),
        (lambda data: {key: value for key, value in data.items() if key != "sha256"}, "is not the record"),
        (lambda data: data | {"key": {**data["key"], "library": "cudnn"}}, "library: found 'cudnn'"),
        (lambda data: data | {"key": {**data["key"], "profile": {"latent": [[1], [2]]}}}, "expected a list of 3"),
        (lambda data: data | {"key": {**data["key"], "sm": 1}}, "is not the record"),
        (lambda data: data | {"bytes": "72"}, "bytes: found '72'; expected a whole"),
    ],
)
def test_record_load_refuses_damaged_files(tmp_path, edit, message):
    engine = an_engine(tmp_path)
    path = record_path(engine)
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(BackendError, match=message):
        verified_record(engine)
    path.write_text("{")
    with pytest.raises(BackendError, match="cannot be read"):
        verified_record(engine)


def test_graph_digest_covers_graph_and_weights(tmp_path):
    graph, weights = tmp_path / "toy.onnx", tmp_path / "toy.data"
    graph.write_bytes(b"graph")
    weights.write_bytes(b"weights")
    before = graph_digest(graph)
    (tmp_path / "styles.txt").write_text("of no account")
    assert graph_digest(graph) == before
    weights.write_bytes(b"weightz")
    changed = graph_digest(graph)
    graph.write_bytes(b"grapf")
    assert len({before, changed, graph_digest(graph)}) == 3


def test_engine_folder_is_named_by_the_base(monkeypatch, tmp_path):
    monkeypatch.setenv("LSAST_HOME", str(tmp_path))
    fingerprint = Bundle.open(EMBEDDED, verify_hashes=False).manifest.fingerprint
    folder = tmp_path / "compiled" / f"mini-{fingerprint[:16]}" / "tensorrt" / "fp16"
    assert engine_folder(EMBEDDED, "tensorrt", "fp16") == folder
    with pytest.raises(BackendError, match="is not a bundle"):
        engine_folder(tmp_path, "tensorrt", "fp16")
    if sys.platform != "win32":
        tmp_path.chmod(0o777)
        with pytest.raises(BackendError, match=f"found {tmp_path}, which others may write"):
            engine_folder(EMBEDDED, "tensorrt", "fp16")


def test_profile_of_a_split_graph_halves_deeper_levels():
    cut = UnetSplit(residuals=((6, 0), (6, 1), (9, 3)), outer=1, feature=7)
    specs = split_specs(GEOMETRY, cut)
    profile = ShapeRanges().profile(specs["unet_full"])
    assert profile["residual_1"] == ((1, 6, 24, 24), (1, 6, 32, 32), (4, 6, 64, 64))
    assert profile["residual_2"] == ((1, 9, 6, 6), (1, 9, 8, 8), (4, 9, 16, 16))
    shapes = {"latent": (2, 4, 48, 64), "hint": (2, 6, 48, 64), "timestep": (2,), "kv_control": (2, 8, 16)}
    found = output_shapes(specs["controlnet"], {**shapes, "control_scale": ()})
    assert found == {"residual_0": (2, 6, 48, 64), "residual_1": (2, 6, 24, 32), "residual_2": (2, 9, 6, 8)}


def test_profile_and_output_shapes_match_values_by_hand():
    profile = ShapeRanges().profile(SPECS["denoiser"])
    # By hand: 384, 512 and 1024 pixels are 48, 64 and 128 cells.
    assert profile["latent"] == ((1, 4, 48, 48), (1, 4, 64, 64), (4, 4, 128, 128))
    assert profile["kv_unet"] == ((1, 1, 8, 40), (2, 1, 8, 40), (2, 4, 8, 40))
    assert profile["control_scale"] == ((), (), ())
    assert profile["timestep"] == ((1,), (1,), (4,))
    assert ShapeRanges().profile(SPECS["vae_encoder"])["image"].max == (1, 3, 1024, 1024)
    assert output_shapes(SPECS["vae_encoder"], {"image": (2, 3, 384, 512)})["std"] == (2, 4, 48, 64)
    assert output_shapes(SPECS["vae_decoder"], {"latent": (2, 4, 48, 64)}) == {"image": (2, 3, 384, 512)}


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"side": Range(512, 384, 1024)}, "side: found 512, 384, 1024; expected minimum, optimum and maximum"),
        ({"side": Range(380, 512, 1024)}, "expected multiples of 8"),
        ({"batch": Range(0, 1, 4)}, "batch: found 0, 1, 4"),
        ({"guidance": Range(1, 2, 3)}, "guidance: found 3 passes"),
    ],
)
def test_shape_ranges_refuse_invalid_values(ranges, message):
    with pytest.raises(UsageError, match=message):
        ShapeRanges(**ranges)


def test_check_profile_lists_all_faults():
    profile = ShapeRanges().profile(SPECS["denoiser"])
    check_profile(profile, {"latent": (4, 4, 48, 128)}, "denoiser")
    latent = r"latent: found \[5, 4, 64, 64\]; expected \[1, 4, 48, 48\] to \[4, 4, 128, 128\]"
    with pytest.raises(BackendError, match=rf"{latent}\n.*hint: found \[1, 6, 40, 64\]"):
        check_profile(profile, {"latent": (5, 4, 64, 64), "hint": (1, 6, 40, 64)}, "denoiser")
