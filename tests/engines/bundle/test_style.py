import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lsast_engines.bundle.safetensors_header import Slot, read_slots
from lsast_engines.bundle.style import (
    LatentStatistics,
    Style,
    StyleFile,
    decode_defaults,
    encode_defaults,
    stage_digest,
)
from lsast_engines.errors import StyleError, UsageError


def test_style_file_keeps_all_fields_in_float16_and_is_equal_for_equal_styles(tmp_path, make_style):
    style, files = make_style(), [tmp_path / "new" / name for name in "abc"]
    backwards = dataclasses.replace(style, meta=dict(reversed(style.meta.items())))
    for each, file in zip((style, style, backwards), files, strict=True):
        each.save(file)
    assert len({file.read_bytes() for file in files}) == 1
    loaded, stored = Style.load(files[0]), load_file(files[0])  # as any reader of safetensors sees it
    for name in ("kv_unet", "kv_control"):
        tensor = getattr(loaded, name)
        assert (tensor.dtype, tensor.flags.c_contiguous, stored[name].dtype) == (np.float32, True, np.float16)
        np.testing.assert_array_equal(tensor, getattr(style, name).astype(np.float16))
    fields = ("name", "base", "stages", "tokens", "meta")
    assert [getattr(loaded, field) for field in fields] == [getattr(style, field) for field in fields]


def test_style_of_invalid_tensors_lists_all_faults(make_style):
    style = make_style()
    spoilt = style.kv_control.copy()
    spoilt[0, 0, 0] = np.nan
    shape = r"kv_unet: found shape \[9, 3, 20\]; expected \[10, 3, width\]"
    with pytest.raises(StyleError, match=rf"{shape}\n.*kv_control: found NaN or infinite values"):
        dataclasses.replace(style, kv_unet=style.kv_unet[:9], kv_control=spoilt)


def test_style_save_refuses_paths_and_values_beyond_float16(tmp_path, make_style):
    style = make_style()
    with pytest.raises(StyleError, match=r"name: found '\.\./x'; expected up to 100 letters"):
        dataclasses.replace(style, name="../x").save(tmp_path / "a")
    with pytest.raises(StyleError, match="kv_unet: found 100000; expected at most 65504"):
        dataclasses.replace(style, kv_unet=style.kv_unet * 1e5 / np.abs(style.kv_unet).max()).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def resave(path: Path, change: dict[str, Any] | Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Write a style file again, with other fields in its header, or changed by a function of header and tensors."""
    with safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["lsast"])
    tensors = load_file(path)
    if callable(change):
        change(header, tensors)
    else:
        header.update(change)
    save_file(tensors, path, {"lsast": json.dumps(header)})


def make_infinite(header: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["kv_control"][4] = np.inf
    header["sha256"][4] = stage_digest({name: tensor[4] for name, tensor in tensors.items()})


WRONG_DEFAULTS = ["{", "[1]", '{"size": 64}', '{"steps": "many"}', "[" * 10**5, '{"strength": 1' + "0" * 400 + "}"]
WRONG_STATISTICS = [
    *("{", "[]", '{"mean": [0.1]}', '{"mean": [0.1], "std": [0.0]}', '{"mean": [0.1, 1], "std": [1]}'),
    *('{"mean": [], "std": []}', '{"mean": ["a"], "std": [1]}', '{"mean": [1e999], "std": [1]}'),
]
STATISTICS_FAULT = r"latent_statistics(\.\w+(\[0\])?)?: (found|invalid)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, tensors: tensors["kv_unet"].__setitem__((0, 0, 0), 7), "SHA-256 of stage 0 differs"),
        (make_infinite, "NaN or infinite values in kv_control of stage 4"),
        (lambda _, tensors: tensors.pop("kv_control"), "kv_control: found no such tensor"),
        (
            lambda _, tensors: tensors.update(kv_unet=np.zeros((10, 3, 20), "f4")),
            "kv_unet: found type F32; expected F16",
        ),
        (lambda header, _: header["sha256"].pop(), "sha256: found 9 texts; expected one for each of 10 stages"),
        (lambda header, _: header.pop("format"), "not a style; bake one with: lsast-export"),
        ({"format": 1}, "has format 1; this version reads format 2"),
        ({"stages": 9}, r"kv_unet: found shape \[10, 3, 20\]; expected \[9, 3"),
        ({"sha256": [1] * 10}, r"sha256\[0\]: found 1; expected text"),
        ({"name": 3, "tokens": "3"}, r"name: found 3; expected text\n.*tokens: found '3'"),
        ({"name": "../../.bashrc"}, r"name: found '\.\./\.\./\.bashrc'; expected up to"),
        ({"name": "a\x1b[2J"}, "name: found .*; expected up to"),
        ({"meta": [1]}, "meta: found .1.; expected an object"),
        ({"meta": {"defaults": [1]}}, r"meta\.defaults: found \[1\]; expected text"),
        *(({"meta": {"defaults": text}}, "defaults: ") for text in WRONG_DEFAULTS),
        *(({"meta": {"latent_statistics": text}}, STATISTICS_FAULT) for text in WRONG_STATISTICS),
    ],
)
def test_style_load_refuses_damaged_files(tmp_path, make_style, change, message):
    path = tmp_path / "a.safetensors"
    make_style().save(path)
    resave(path, change)
    with pytest.raises(StyleError, match=message):
        Style.load(path)


def test_style_file_reads_only_the_stages_that_are_asked_for(tmp_path, make_style):
    style, path = make_style(), tmp_path / "a.safetensors"
    style.save(path)
    resave(path, lambda header, tensors: tensors["kv_unet"].__setitem__((3, 0, 0), 7))  # stage 3 is damaged
    file = StyleFile(path)
    make_style("another").save(path)  # what replaces the file has no effect
    assert (file.name, file.stages, file.bytes) == ("a", 10, 0)
    for stage in (6, 2, 6):
        row = file.stage(stage)
        np.testing.assert_array_equal(row.kv_unet, style.kv_unet[stage].astype(np.float16))
        np.testing.assert_array_equal(row.kv_control, style.kv_control[stage].astype(np.float16))
        assert (row.kv_unet.dtype, row.kv_unet.flags.c_contiguous) == (np.float32, True)
    assert file.bytes == 2 * 3 * (20 + 8) * 4
    with pytest.raises(StyleError, match=r"the SHA-256 of stage 3 differs"):
        file.stage(3)
    with pytest.raises(StyleError, match="stage 3"):
        file.load()


def test_style_file_that_is_cut_off_while_it_is_open_raises(tmp_path, make_style):
    path = tmp_path / "a.safetensors"
    make_style().save(path)
    file = StyleFile(path)
    path.open("wb").close()  # of a mapped file the next reading would end the process (SIGBUS)
    with pytest.raises(StyleError, match="stage 3 differs"):
        file.stage(3)


def test_style_load_refuses_unreadable_files(tmp_path, make_style):
    path = tmp_path / "a.safetensors"
    with pytest.raises(StyleError, match="found no style file"):
        Style.load(path)
    make_style().save(path)
    whole = path.read_bytes()
    for cut in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(StyleError, match="cannot be read"):
            Style.load(path)
    path.write_bytes(b"PK\x03\x04" + whole)
    with pytest.raises(StyleError, match="cannot be read"):
        Style.load(path)
    save_file({"kv_unet": np.zeros(2)}, path)
    with pytest.raises(StyleError, match="a safetensors file but not a style"):
        Style.load(path)


def test_style_file_gives_its_defaults_and_the_statistics_of_its_latents(tmp_path, make_style):
    values = {"strength": 1.0, "guidance": 8, "control_scale": 0.9, "steps": 11, "solver": "ddim"}
    statistics = LatentStatistics((0.1, -2.0), (0.5, 1.25))
    meta = {"licence": "", **encode_defaults(values), **statistics.to_meta()}
    for name, written in (("full", meta), ("empty", encode_defaults({}))):
        dataclasses.replace(make_style(), meta=written).save(tmp_path / name)
    full, empty = StyleFile(tmp_path / "full"), StyleFile(tmp_path / "empty")
    assert (full.defaults, full.latent_statistics, full.meta) == (values, statistics, meta)
    assert (empty.defaults, empty.latent_statistics) == ({}, None)


def test_encode_defaults_lists_all_invalid_values_and_decode_gives_none():
    with pytest.raises(UsageError) as caught:
        encode_defaults({"style": "monet", "steps": 2.5, "strength": True, "guidance": 3})
    for part in ("'style'", "steps: found 2.5", "strength: found True"):
        assert part in str(caught.value)
    assert "guidance: found" not in str(caught.value)
    assert all(decode_defaults({"defaults": text})[0] == {} for text in WRONG_DEFAULTS)


def test_style_file_can_be_read_until_python_has_ended(tmp_path, make_style):
    """A daemon thread may paint until then. What is registered first at the end of Python is called last."""
    make_style("hand").save(tmp_path / "hand.safetensors")
    script = (
        "import atexit, sys, pathlib; atexit.register(lambda: print(style.stage(9).kv_unet.shape));"
        "from lsast_engines.bundle.style import StyleFile; style = StyleFile(pathlib.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "hand.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("(3, 20)\n", "")


def test_style_file_that_is_replaced_while_it_is_opened_is_the_new_one(tmp_path, make_style, monkeypatch):
    path, new = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    make_style().save(path)
    make_style("new").save(new)

    def replace(file: Path) -> dict[str, Slot]:
        if new.exists():
            new.replace(path)
        return read_slots(file)

    monkeypatch.setattr("lsast_engines.bundle.style.read_slots", replace)
    file = StyleFile(path)
    file.load()
    assert file.name == "new"
