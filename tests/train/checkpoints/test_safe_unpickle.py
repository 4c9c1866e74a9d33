"""Pickled checkpoints: what is in them comes out, and nothing of a hostile one runs."""

from __future__ import annotations

import copyreg
import functools
import io
import logging
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from golden_sets import GoldenFiles, both_sets
from lsast_engines.errors import TrainingError
from lsast_train.checkpoints.safe_unpickle import load_module_tensors, load_tensors

LOADERS = [load_tensors, load_module_tensors]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that a hostile checkpoint would make."""
    return tmp_path / "marker"


@pytest.fixture(autouse=True)
def _nothing_ran(marker: Path) -> Any:
    yield
    assert not marker.exists()


def _archive(path: Path, data: bytes, **entries: bytes) -> Path:
    """A file as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


class _Calls:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


class _SetsState:
    """A class whose __setstate__ would make the marker."""

    def __getstate__(self) -> dict[str, str]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["path"]).touch()

    path: str


def _touch(marker: Path) -> str:
    return f"touch {marker}"


def test_tensors_of_every_kind_come_out_as_torch_loads_them(tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    tensors = {
        "transposed": shared.view(3, 4).T,
        "part": shared[3:7],
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
        **{str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)},
        **{str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.uint8, torch.bool)},
    }
    path = tmp_path / "a.pth"
    torch.save(tensors, path)
    found = load_tensors(path)
    expected = torch.load(path, weights_only=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].stride() == value.stride()
        assert torch.equal(found[name], value)


def test_a_state_dict_is_taken_out_of_a_training_checkpoint(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    path = tmp_path / "a.ckpt"
    inner = {"epoch": 7, "state_dict": module.state_dict(), "hyper": {"lr": 1e-4, "betas": (0.9, 0.999), "x": None}}
    torch.save({**inner, "sizes": torch.Size([1, 2]), "dtype": torch.float16, "names": {"a", "b"}}, path)
    found = load_tensors(path)
    assert found.keys() == module.state_dict().keys()
    assert all(torch.equal(found[key], value) for key, value in module.state_dict().items())


def test_what_lightning_stores_beside_the_weights_is_passed_over(tmp_path: Path) -> None:
    """The callbacks of the published v1-5-pruned.ckpt are keyed by a class of PyTorch Lightning."""
    data = io.BytesIO()
    # {"callbacks": {ModelCheckpoint: {}}, "state_dict": OrderedDict()} with protocol 2's instructions
    data.write(
        b"\x80\x02}(X\x09\x00\x00\x00callbacks}cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n}s"
    )
    data.write(b"X\x0a\x00\x00\x00state_dictccollections\nOrderedDict\n)Ru.")
    with pytest.raises(TrainingError, match="holds no tensors"):
        load_tensors(_archive(tmp_path / "a.ckpt", data.getvalue()))


def test_module_tensors_have_the_names_of_the_state_dict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ModuleList([nn.BatchNorm1d(4), nn.LayerNorm(4)])).train()
    path = tmp_path / "a.pt"
    torch.save({"attention": module, "initial_embeddings": nn.Parameter(torch.ones(1, 3))}, path)
    with caplog.at_level(logging.INFO, "lsast"):
        found = load_module_tensors(path)
    expected = {f"attention.{key}": value for key, value in module.state_dict().items()}
    assert found.keys() == {*expected, "initial_embeddings"}
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert "'attention' was stored in training mode" in caplog.text
    caplog.clear()
    torch.save(module.eval(), path)
    assert load_module_tensors(path).keys() == module.state_dict().keys()
    assert "training mode" not in caplog.text
    with pytest.raises(TrainingError, match=r"torch\.nn\.modules\.container\.Sequential"):
        load_tensors(path)


@both_sets
def test_load_module_tensors_of_a_released_checkpoint_gives_its_tensors(golden: GoldenFiles) -> None:
    found = load_module_tensors(golden.checkpoint)
    initial = golden.generator()["initial"]
    assert torch.equal(found["initial_embeddings"].float(), initial)
    dim = initial.shape[1]
    assert found["attention.ff.net.2.weight"].shape == (30 * dim, 4 * dim)
    assert found["attention.attn1.to_q.weight"].shape[1] == dim


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "named"),
    [
        (os.system, f"{os.system.__module__}.system"),
        (eval, "builtins.eval|__builtin__.eval"),
        (exec, "builtins.exec|__builtin__.exec"),
        (getattr, "builtins.getattr|__builtin__.getattr"),
        (functools.partial, "functools.partial"),
        (torch.load, "torch.serialization.load"),
        (torch.hub.load, "torch.hub.load"),
    ],
    ids=["os.system", "eval", "exec", "getattr", "partial", "torch.load", "torch.hub"],
)
def test_calls_of_anything_else_are_refused(
    tmp_path: Path, marker: Path, loader: Any, protocol: int, function: Any, named: str
) -> None:
    data = pickle.dumps({"weight": _Calls(function, _touch(marker))}, protocol)
    with pytest.raises(TrainingError, match=f"(?s)refused, nothing of it was run; found:.*({named})"):
        loader(_archive(tmp_path / "bad.pt", data))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_foreign_setstate_does_not_run(tmp_path: Path, marker: Path, loader: Any, protocol: int) -> None:
    hostile = _SetsState()
    hostile.path = str(marker)
    data = pickle.dumps({"weight": hostile}, protocol)
    with pytest.raises(TrainingError, match=r"refused.*\n.*_SetsState"):
        loader(_archive(tmp_path / "bad.pt", data))


def test_classes_of_ldm_and_torch_are_inert(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that exists under the name of an allowed module is never imported, built or called."""
    module = types.ModuleType("ldm.modules.evil")
    monkeypatch.setattr(_SetsState, "__module__", module.__name__)
    module._SetsState = _SetsState  # type: ignore[attr-defined]
    for name in ("ldm", "ldm.modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    hostile = _SetsState()
    hostile.path = str(marker)
    with pytest.raises(TrainingError, match="holds no tensors"):
        load_module_tensors(_archive(tmp_path / "state.pt", pickle.dumps({"a": hostile}, 2)))
    tensor = b"cldm.modules.evil\nEvil\n"  # GLOBAL
    made = b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b")\x81}X\x01\x00\x00\x00pX\x01\x00\x00\x00qsbs."  # NEWOBJ, BUILD
    with pytest.raises(TrainingError, match="holds no tensors"):
        load_module_tensors(_archive(tmp_path / "inert.pt", made))
    called = b"\x80\x02}X\x01\x00\x00\x00actorch.nn.init\nnormal_\n(X\x01\x00\x00\x00qtRs."  # REDUCE
    with pytest.raises(TrainingError, match=r"a call of torch\.nn\.init\.normal_"):
        load_module_tensors(_archive(tmp_path / "called.pt", called))
    with_arguments = b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"K\x01\x85\x81s."
    with pytest.raises(TrainingError, match=r"arguments for ldm\.modules\.evil\.Evil"):
        load_module_tensors(_archive(tmp_path / "arguments.pt", with_arguments))
    for dotted in (b"ctorch.nn.modules.os\nsystem\n", b"ctorch.nn\nos.system\n"):
        data = b"\x80\x02}X\x01\x00\x00\x00a" + dotted + b"(X\x01\x00\x00\x00qtRs."
        with pytest.raises(TrainingError, match="a call of torch"):
            load_module_tensors(_archive(tmp_path / "dotted.pt", data))
    for outside in (b"ctorch.nnx\nsystem\n", b"cldmx\nsystem\n", b"ctorch\nsave\n"):
        with pytest.raises(TrainingError, match="refused"):
            load_module_tensors(_archive(tmp_path / "outside.pt", b"\x80\x02" + outside + b"."))


@pytest.mark.parametrize("loader", LOADERS)
def test_all_hostile_names_are_listed(tmp_path: Path, marker: Path, loader: Any) -> None:
    nested = {"a": [({"b": _Calls(os.system, _touch(marker))},)], "c": _Calls(eval, _Calls(compile, "1", "x", "eval"))}
    with pytest.raises(TrainingError) as caught:
        loader(_archive(tmp_path / "bad.pt", pickle.dumps(nested, 2)))
    assert {"system", "eval", "compile"} <= {line.rpartition(".")[2] for line in str(caught.value).split("\n")}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("loader", LOADERS)
def test_extension_codes_are_refused(tmp_path: Path, marker: Path, loader: Any, cached: bool) -> None:
    """A code that is in copyreg's cache is resolved by pickle without asking for its name."""
    code = 240
    module = os.system.__module__
    copyreg.add_extension(module, "system", code)
    try:
        data = pickle.dumps({"weight": _Calls(os.system, _touch(marker))}, 2)
        assert pickle.EXT1 in data
        if cached:
            pickle.loads(pickle.dumps(os.system, 2))
        with pytest.raises(TrainingError, match=f"the instruction EXT1 {code}"):
            loader(_archive(tmp_path / "bad.pt", data))
    finally:
        copyreg.remove_extension(module, "system", code)
        copyreg.clear_extension_cache()


@pytest.mark.parametrize(
    "data",
    [
        b"(S'%s'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'%s'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93(\x8c\x00%s\x94tR.",  # STACK_GLOBAL; its text's length is filled in below
        b"\x80\x02cbuiltins\n__import__\n(X\x02\x00\x00\x00ostR.",
        b"\x80\x04\x8c\x05torch\x8c\x13serialization.os.mk\x93.",  # a dotted name
        b"cos\nsystem\n(S'%s'\ntR" * 2 + b".",
    ],
    ids=["INST", "OBJ", "STACK_GLOBAL", "import", "dotted", "twice"],
)
@pytest.mark.parametrize("loader", LOADERS)
def test_other_ways_to_a_name_are_refused(tmp_path: Path, marker: Path, loader: Any, data: bytes) -> None:
    command = _touch(marker).encode()
    data = data.replace(b"\x8c\x00%s", b"\x8c" + bytes([len(command)]) + command).replace(b"%s", command)
    with pytest.raises(TrainingError, match="refused, nothing of it was run"):
        loader(_archive(tmp_path / "bad.pt", data))


@pytest.mark.parametrize(
    "state", [{"x": 1}, (None, {"_function": 1}), (None, {"__class__": 1})], ids=["dict", "slots", "class"]
)
def test_no_state_sticks_to_what_stands_in_for_a_name(tmp_path: Path, state: Any) -> None:
    tensor = _storage_pickle("0", 4, (4,), (1,))[2:-1]  # without its protocol and its stop
    for target in (
        b"ccollections\nOrderedDict\n",
        b"ctorch\nFloatStorage\n",
        tensor[tensor.index(b"ctorch._utils") : -1],
    ):
        data = b"\x80\x02" + target + pickle.dumps(state, 2)[2:-1] + b"b."
        with pytest.raises(TrainingError, match="a state set on what has none"):
            load_tensors(_archive(tmp_path / "bad.pt", data, **{"archive/data/0": bytes(16)}))
    good = tmp_path / "good.pt"
    torch.save(OrderedDict(a=torch.ones(2)), good)
    assert load_tensors(good).keys() == {"a"}


def _storage_pickle(key: str, numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    class _Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", numel) if value == "the storage" else None

    arguments = ("the storage", offset, size, stride, False, OrderedDict())
    data = io.BytesIO()
    _Pickler(data, 2).dump({"a": _Calls(torch._utils._rebuild_tensor_v2, *arguments)})
    return data.getvalue()


@pytest.mark.parametrize(
    ("size", "stride", "offset", "message"),
    [
        ((5,), (1,), 0, "reads value 4 of a storage of 4"),
        ((2,), (4,), 0, "reads value 4 of a storage of 4"),
        ((2,), (1,), 3, "reads value 4 of a storage of 4"),
        ((2,), (-1,), 1, "a tensor of size"),
        ((2,), (1,), -1, "a tensor of size"),
        ((2, 2), (1,), 0, "unlike size and stride"),
    ],
)
def test_tensors_that_reach_outside_of_their_storage_are_refused(
    tmp_path: Path, size: Any, stride: Any, offset: int, message: str
) -> None:
    content = torch.arange(4.0).numpy().tobytes()
    good = _archive(tmp_path / "good.pt", _storage_pickle("0", 4, (2, 2), (2, 1)), **{"archive/data/0": content})
    assert torch.equal(load_tensors(good)["a"], torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    data = _storage_pickle("0", 4, size, stride, offset)
    with pytest.raises(TrainingError, match=message):
        load_tensors(_archive(tmp_path / "bad.pt", data, **{"archive/data/0": content}))


@pytest.mark.parametrize("key", ["../../../secret", "/etc/passwd", "1"])
def test_storages_come_from_the_archive_alone(tmp_path: Path, key: str) -> None:
    (tmp_path / "secret").write_bytes(b"0123456789abcdef")
    data = _storage_pickle(key, 4, (4,), (1,))
    with pytest.raises(TrainingError, match="no entry for storage"):
        load_tensors(_archive(tmp_path / "bad.pt", data, **{"archive/data/0": bytes(16)}))


@pytest.mark.parametrize("name", ["../marker", "/marker", "archive/../../marker", "C:\\marker", "..\\marker"])
def test_entries_outside_of_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    good = io.BytesIO()
    torch.save({"a": torch.ones(2)}, good)
    path = tmp_path / "bad.pt"
    path.write_bytes(good.getvalue())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(TrainingError, match="outside of the archive"):
        load_tensors(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_archives_are_refused(tmp_path: Path) -> None:
    twice = _archive(tmp_path / "twice.pt", pickle.dumps({}, 2))
    with zipfile.ZipFile(twice, "a") as archive:
        archive.writestr("archive/data.pkl", b"")
    with pytest.raises(TrainingError, match=r"entry 'archive/data\.pkl' 2 times"):
        load_tensors(twice)
    data = pickle.dumps({}, 2)
    compressed = tmp_path / "compressed.pt"
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", data * 10)
    with pytest.raises(TrainingError, match="compressed"):
        load_tensors(compressed)
    with pytest.raises(TrainingError, match=r"2 entries data\.pkl"):
        load_tensors(_archive(tmp_path / "two.pt", data, **{"other/data.pkl": data}))
    with pytest.raises(TrainingError, match="big-endian"):
        load_tensors(_archive(tmp_path / "big.pt", data, **{"archive/byteorder": b"big"}))
    for name, content in (("cut.pt", b"\x80\x02}X"), ("noise.pt", b"\x93\x00\xff")):
        with pytest.raises(TrainingError, match=r"cannot be read|refused"):
            load_tensors(_archive(tmp_path / name, content))


def test_old_and_other_files_say_what_to_do(tmp_path: Path, marker: Path) -> None:
    old = tmp_path / "old.pt"
    torch.save({"a": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
    with pytest.raises(TrainingError, match=r"since 1\.6.*safetensors"):
        load_tensors(old)
    bare = tmp_path / "bare.pt"
    bare.write_bytes(pickle.dumps(_Calls(os.system, _touch(marker))))
    with pytest.raises(TrainingError, match=r"no archive of torch\.save"):
        load_tensors(bare)
    with pytest.raises(TrainingError, match="found no file"):
        load_tensors(tmp_path / "none.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(TrainingError, match="holds list; expected tensors by name"):
        load_tensors(tmp_path / "list.pt")
