"""Pickled modules: their tensors come out, nothing of a hostile file runs, and no file takes long or much memory."""

import functools
import io
import logging
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lsast_engines.errors import TrainingError
from lsast_train.checkpoints.safe_unpickle import load_module_tensors
from lsast_train.checkpoints.weights import read_tensors

LOADERS = [load_module_tensors, read_tensors]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that a hostile checkpoint would make."""
    return tmp_path / "marker"


@pytest.fixture(autouse=True)
def _nothing_ran(marker: Path) -> Iterator[None]:
    yield
    assert not marker.exists()


def _archive(path: Path, data: bytes, **entries: bytes) -> Path:
    """A file as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return path


class _Calls:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _tensor(size: bytes = b"K\x02\x85", stride: bytes = b"K\x01\x85", offset: bytes = b"K\x00") -> bytes:
    """A float32 tensor of the storage ``0``; size, stride and offset are instructions."""
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + b"K\x02tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + b"\x89N" + b"tR"


def _dictionary(value: bytes) -> bytes:
    """The pickle of a dictionary with one entry ``w``."""
    return b"\x80\x02}" + _text("w") + value + b"s."


def _bomb(first: bytes, use: bytes) -> bytes:
    """A pickle that makes 60 tuples, each of them twice the one before, from `first`; ``%s`` in `use` is the last."""
    made = first + b"q\x00"
    for level in range(1, 60):
        made += b"h" + bytes([level - 1]) + b"h" + bytes([level - 1]) + b"\x86q" + bytes([level])
    return b"\x80\x02" + made + use.replace(b"%s", b"h\x3b") + b"."


def test_load_module_tensors_gives_the_names_of_the_state_dict(tmp_path, caplog):
    module = nn.Sequential(nn.Linear(3, 4), nn.ModuleList([nn.BatchNorm1d(4), nn.LayerNorm(4)])).train()
    path = tmp_path / "a.pt"
    torch.save({"attention": module, "initial_embeddings": nn.Parameter(torch.ones(1, 3).T)}, path)
    with caplog.at_level(logging.INFO, "lsast"), torch.device("meta"):
        found = load_module_tensors(path)
    expected = {f"attention.{key}": value for key, value in module.state_dict().items()}
    assert found.keys() == {*expected, "initial_embeddings"}
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert found["initial_embeddings"].shape == (3, 1)
    assert caplog.text.count("stored in training mode") == 1
    assert "'attention'" in caplog.text
    caplog.clear()
    torch.save(module.eval(), path)
    assert load_module_tensors(path).keys() == module.state_dict().keys()
    assert "training mode" not in caplog.text


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "function", [os.system, eval, getattr, functools.partial, torch.load], ids=lambda function: function.__name__
)
def test_calls_of_functions_are_refused_by_name(tmp_path, marker, loader, function):
    data = pickle.dumps({"weight": _Calls(function, f"touch {marker}")}, 2)
    with pytest.raises(TrainingError, match=f"refused, nothing of it was run: found .*{function.__name__}"):
        loader(_archive(tmp_path / "bad.pt", data))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "data",
    [
        b"(S'touch %s'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x02\x82\xf0.",
        b"\x80\x02K\x01K\x01R.",
        b"\x80\x02]}b.",
        b"\x80\x02]K\x01K\x02s.",
        b"\x80\x02}K\x01a.",
        b"\x80\x02]Q.",
        b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x40\x85R.",
        b"\x80\x02" + 30 * b"c_codecs\nencode\n" + _text("x") + 30 * (_text("hex_codec") + b"\x86R") + b".",
    ],
    ids=["INST", "STACK_GLOBAL", "EXT1", "call", "state", "set", "append", "storage", "memory", "doubled"],
)
def test_instructions_that_torch_does_not_write_are_refused(tmp_path, marker, loader, data):
    with pytest.raises(TrainingError, match="refused, nothing of it was run"):
        loader(_archive(tmp_path / "bad.pt", data.replace(b"%s", str(marker).encode())))


@pytest.mark.parametrize("call", [b"ctorch\nFloatTensor\nJ\x00\x00\x00\x10\x85R", b"ctorch._utils\n"
                                  b"_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\nK\x09\x85K\x01\x85\x89tR"],
                         ids=["made", "meta"])  # fmt: skip
def test_load_module_tensors_refuses_tensors_that_are_not_in_the_file(tmp_path, call):
    with pytest.raises(TrainingError, match=r"refused, nothing of it was run: found .*tensor"):
        load_module_tensors(_archive(tmp_path / "bad.pt", _dictionary(call)))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_file_from_before_1_6_that_ends_as_an_archive_is_checked_as_torch_reads_it(tmp_path, loader):
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    tail = _archive(tmp_path / "harmless.pt", b"\x80\x02}.").read_bytes()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(head + _bomb(b"K\x01", b"}%sK\x01s") + pickle.dumps([], 2) + tail)
    with pytest.raises(TrainingError, match="refused, nothing of it was run: found a tuple of more than"):
        loader(path)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "data",
    [
        _bomb(b"K\x01", b"}" + _text("w") + b"%ss"),
        _bomb(b"K\x01", b"}%sK\x01s"),
        _bomb(_text("x" * 20), b"%sQ"),
        _bomb(b"K\x01", b"}" + _text("w") + _tensor(size=b"%s") + b"s"),
    ],
    ids=["value", "key", "reference", "size"],
)
def test_shared_tuples_are_refused_before_anyone_walks_them(tmp_path, loader, data):
    """A kilobyte each; hashing or printing the last takes 2**60 steps."""
    with pytest.raises(TrainingError, match="a tuple of more than"):
        loader(_archive(tmp_path / "bomb.pt", data, **{"data/0": bytes(8)}))


def test_load_module_tensors_refuses_shared_and_deep_containers_and_lists(tmp_path):
    shared = b"\x80\x02}" + _text("w") + _tensor() + b"sq\x00"
    for level in range(1, 45):
        shared += b"}q" + bytes([level])
        for name in "ab":
            shared += _text(name) + b"h" + bytes([level - 1]) + b"s"
    deep = b"\x80\x02" + (b"}" + _text("a")) * 5000 + b"N" + b"s" * 5000 + b"."
    cases = {
        "twice": (shared + b".", "the same container twice"),
        "itself": (b"\x80\x02}q\x00" + _text("a") + b"h\x00s.", "the same container twice"),
        "deep": (deep, "RecursionError"),
        "list": (pickle.dumps([1, 2], 2), "holds no tensors"),
    }
    for name, (data, message) in cases.items():
        with pytest.raises(TrainingError, match=message):
            load_module_tensors(_archive(tmp_path / f"{name}.pt", data, **{"data/0": bytes(8)}))


def test_a_huge_memo_index_takes_no_memory(tmp_path):
    data = b"\x80\x02}r" + struct.pack("<I", 2**31) + _text("w") + _tensor() + b"s."
    found = load_module_tensors(_archive(tmp_path / "a.pt", data, **{"data/0": bytes(8)}))
    assert torch.equal(found["w"], torch.zeros(2))


@pytest.mark.parametrize(
    "tensor",
    [
        _tensor(size=b"K\x03\x85"),
        _tensor(stride=b"K\x02\x85"),
        _tensor(offset=b"K\x01"),
        _tensor(size=b"K\x09\x85", stride=b"K\x00\x85"),
        _tensor(stride=b"J\xff\xff\xff\xff\x85"),
        _tensor(size=b"K\x02K\x01\x86"),
        _tensor(size=_text("x") + b"\x85"),
        _tensor().replace(b"FloatStorage", b"EvilStorage"),
        _tensor().replace(_text("0"), _text("../secret")),
        _tensor().replace(_text("0"), _text("1")),
    ],
    ids=["size", "stride", "offset", "expanded", "negative", "unlike", "text", "type", "path", "missing"],
)
def test_tensors_outside_of_their_storage_are_refused(tmp_path, tensor):
    (tmp_path / "secret").write_bytes(bytes(8))
    good = _archive(tmp_path / "good.pt", _dictionary(_tensor()), **{"data/0": struct.pack("<2f", 1, 2)})
    assert load_module_tensors(good)["w"].tolist() == [1, 2]
    with pytest.raises(TrainingError, match=r"refused|cannot be read"):
        load_module_tensors(_archive(tmp_path / "bad.pt", _dictionary(tensor), **{"data/0": bytes(8)}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("loader", LOADERS)
def test_damaged_and_odd_archives_are_refused(tmp_path, loader):
    data = pickle.dumps({}, 2)
    twice = _archive(tmp_path / "twice.pt", data)
    with zipfile.ZipFile(twice, "a") as archive:
        archive.writestr("archive/data.pkl", b"")
    with pytest.raises(TrainingError, match=r"2 entries data\.pkl"):
        loader(twice)
    compressed = tmp_path / "compressed.pt"
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", data * 10)
    with pytest.raises(TrainingError, match="compressed"):
        loader(compressed)
    for name, content in (("cut.pt", b"\x80\x02}X"), ("noise.pt", b"\x93\x00\xff"), ("empty.pt", b"")):
        with pytest.raises(TrainingError, match=r"cannot be read|refused"):
            loader(_archive(tmp_path / name, content))
    whole = io.BytesIO()
    torch.save({"a": torch.ones(200)}, whole)
    (tmp_path / "half.pt").write_bytes(whole.getvalue()[:600])
    with pytest.raises(TrainingError, match=r"cannot be read|refused"):
        loader(tmp_path / "half.pt")
    with pytest.raises(TrainingError, match="found no file"):
        loader(tmp_path / "none.pt")
